"""The drawing of the tuner's pages: elements, axes, marks, figures and colours.

Nothing here knows what is drawn. A page has no script and fetches nothing.
"""
