"""What must not be drawn or shown: prompt rules, image checkers, and the guard that applies them."""
