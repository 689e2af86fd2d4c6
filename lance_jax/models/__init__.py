"""Networks of the program, one file each, and their `weights`.

All are a `network.Network`: a Linen module over NHWC pictures that divides into a frozen prefix and
a suffix that is trained. `digits` is small and trained by the program; the others come pretrained.
"""
