"""A generated visual world with known truth, for the demo, the tests and small-scale science.

Images are 3 x 3 cells; each cell has a colour, a digit and a coloured dot that points to the next cell of a cycle.
No package outside this one knows about it.
"""
