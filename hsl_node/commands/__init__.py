"""The commands, one file per noun: parse, call, print. What is slow to import is imported inside the functions."""
