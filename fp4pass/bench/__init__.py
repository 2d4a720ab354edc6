"""``python -m fp4pass bench``: time and error of products beside BF16 ones, and the time that compiling takes."""
