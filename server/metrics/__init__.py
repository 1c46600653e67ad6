"""What is counted and measured, under which names. A label's values are few, and no prompt, key or address is one."""
