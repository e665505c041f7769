"""Entity masks: ids per pixel, their colours, the files that hold them, the frame of the model."""
