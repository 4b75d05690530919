"""The fused model: gate, fusion file, preparation on disk, the reference. Knows no data, no training, no commands."""
