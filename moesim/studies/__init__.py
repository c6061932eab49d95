"""What-if studies: a question over many deployments, answered by evaluating them."""
