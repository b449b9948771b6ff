"""Functions of users: masks and scores, from Python to text, and from text to source.

trace        a Python function called once with symbols -> `Program`
symbols      what it is called with; `operators`, `named` and `paths` are Python's operators,
             functions of NumPy and PyTorch by name, and `if`
arrays       the arrays and numbers of `aux` that a program reads
program      a program: what its functions depend on, and their derivatives
text         its canonical text, and the way back; `written` makes functions of it
nodes        what programs are made of: immutable expressions, equal if they mean the same
derivative   expressions differentiated
emission     a program as the source of device functions, which `tiles.programs` runs
identity     a cheap key of a Python function's meaning
math, masks  functions for users
"""
