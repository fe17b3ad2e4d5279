"""The stream: which samples an epoch trains on, in which order, on which rank, and how they become batches.

``bits`` holds the random bits, ``order`` the epoch order as pure functions, ``loader`` turns both into batches.
The first two need numpy alone.
"""
