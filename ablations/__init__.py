"""What the paper compares its method with: other modules in GRN's place, other decoders. The method knows nothing of it."""
