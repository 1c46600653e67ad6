"""What clients send, in our own words: the spellings, model names and habits of other APIs become native fields."""
