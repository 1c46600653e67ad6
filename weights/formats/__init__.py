"""What a weights file is: its headers recognized, its tensors read, written and converted."""
