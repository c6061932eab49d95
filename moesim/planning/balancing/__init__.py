"""Schemes that balance experts while serving, judged side by side on one course of steps.

`course` is what is served, `bench` prices it, one file a scheme beside them.
"""
