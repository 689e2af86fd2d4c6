"""Networks of the program: `mcunet` (pretrained, for pictures) and `digits` (small, trained here).

Both are Linen modules over NHWC pictures with the same two attributes: blocks ``start`` to ``stop``
are run, so that one network divides into a frozen prefix, whose output can be cached, and a suffix
``apply_fn(params, features)`` that is trained.
"""
