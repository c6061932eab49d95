"""Reading Hugging Face `config.json`: keys, layers by family, stored types."""
