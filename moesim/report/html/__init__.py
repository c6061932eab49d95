"""`moesim report`: one HTML page, without scripts and without anything to load, from the JSON files
that the commands write.

    runs      files -> Run: which format each one is, refused where damaged or too new
    fields    what a run holds, field by field, with errors that name the field
    svg       drawing: elements, scales, ticks, text that fits
    charts, heatmap   the kinds of chart
    parts     what a page is made of: sections, figures, tables, notes
    *_section one module a kind of run
    page      the whole page
"""
