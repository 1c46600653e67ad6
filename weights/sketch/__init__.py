"""`flux/sketch`, the embedded model that draws. Its weights are not trained yet; `recipe` is how they will be."""
