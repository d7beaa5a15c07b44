"""Small networks made of named blocks and a head, all legal under DP-SGD."""
