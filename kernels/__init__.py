"""The kernels in Triton, one file an operator: a GPU needs no compiler for them. Installed as ``pyzoo.kernels``.

``<op>.py`` has the kernels ``_<op>_fwd_kernel``, ``_<op>_bwd_kernel`` and their launchers, which have the names and the
arguments of the functions of the compiled core. A launcher writes into the tensors that it is given for its results.

In every kernel ``i_`` is a program's index, ``o_`` are offsets, ``m_`` masks, ``p_`` pointers and ``s_`` strides;
offsets into tensors are int64; sums are kept in float32, or in float64 where the tensors are; the one rounding to a
narrower type is the store.
"""
