"""What a user writes: coordinates, relations, scores, normalisers, mechanisms; traced once into the IR."""
