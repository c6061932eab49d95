"""`recommend`: how many GPUs a service needs, and how to split them."""
