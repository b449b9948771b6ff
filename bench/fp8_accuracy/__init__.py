"""The accuracy of FP8 attention, with tables and a figure."""
