"""Sizes for people: the whole file first, and the part of it that is quantized."""


def size_text(file_bytes: int, n_bytes: int, limit: int | None = None) -> str:
    """Bytes of a file of weights and of its quantized part, in MB: millions of bytes, as disks and hubs count.

    Args:
        file_bytes: Bytes of the file.
        n_bytes: Bytes of the quantized part.
        limit: Most bytes of the quantized part; None for no limit.
    """
    most = "" if limit is None else f" of {limit / 1e6:,.2f} MB"
    return f"file {file_bytes / 1e6:,.2f} MB (quantized part {n_bytes / 1e6:,.2f} MB{most})"
