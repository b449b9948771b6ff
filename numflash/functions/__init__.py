"""Functions of users: masks and scores, from Python to text, and from text to source.

trace        a Python function called once with symbols -> `Program`
program      a program, its canonical text, and the way back
nodes        what programs are made of: immutable expressions, equal if they mean the same
derivative   expressions differentiated
emission     a program as the source of device functions, which `tiles.programs` runs
identity     a cheap key of a Python function's meaning
math, masks  functions for users
"""
