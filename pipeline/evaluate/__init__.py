"""What an evaluation is made of: samples drawn once into a cache, what is gathered of them, scores and their table."""
