"""Frames and time, for every family: numpy, Pillow and PyAV, without torch.

frames.py     frames, windows of frames, and the iterator that delivers them
opening.py    `open_frames`: files, images, URLs, cameras, pipes, arrays
decoding.py   frames of a film and their times, as its container states them
pixels.py     `to_rgb`: a picture as a viewer shows it
clips.py      `read_clip`: a fixed number of frames of a video
segments.py   cut a stream of embeddings into scenes
decoder.py    decode text once a scene
"""
