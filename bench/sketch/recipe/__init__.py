"""Training code for `flux/sketch`, the embedded model. It is not part of the wheel.

    python -m bench.sketch.recipe STAGE --out DIR --minutes M

Every stage resumes from its checkpoint in DIR; `__main__` lists them.
"""
