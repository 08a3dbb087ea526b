"""What engines compute of the files that were written for them."""
