"""How `flux/sketch`, the embedded model, is to be made. Training code: not part of the wheel.

    python -m bench.sketch.recipe STAGE --out DIR --minutes M

Every stage resumes from its checkpoint in DIR. There today: the data, the linear code, the decoder, flow matching. Not
there yet: the encoder, guidance distillation, export, evaluation, and so the weights themselves.
"""
