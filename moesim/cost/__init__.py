"""What a forward step costs, in closed form."""
