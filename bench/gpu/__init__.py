"""All that is to be measured once a GPU is at hand, in under half an hour: `python -m bench.gpu`."""
