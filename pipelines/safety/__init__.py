"""Content safety: prompt rules, image checkers, and the guard that applies the operator's policy."""
