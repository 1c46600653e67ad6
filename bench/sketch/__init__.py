"""The embedded model `flux/sketch`: its training recipe, the prompts it is measured by, and its measurements."""
