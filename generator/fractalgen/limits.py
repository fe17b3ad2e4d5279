"""How large an image, a chaos game and a system may be, for whoever draws one."""

SIZES = range(16, 4097)  # pixels of a side
MAX_POINTS = 10**8
MAX_MAPS = 255  # the number of a map is a byte, and one more means none
