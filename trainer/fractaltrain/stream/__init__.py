"""The stream: the order of an epoch (``order``, which needs numpy alone) and its batches (``loader``)."""
