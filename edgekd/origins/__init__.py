"""Where models come from. A file is a prefix: ``keras:teacher.keras`` is read by ``keras.py``.

See :class:`edgekd.protocols.Origin`. ``function.py`` is what a reference without a known prefix means:
``module:function``. No file imports its toolchain before a model is asked for, and none loads a pickle.
"""
