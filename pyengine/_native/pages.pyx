# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=True
"""KV pages: how keys and values lie in them (pages.pxd), and how they get there."""

from libc.stdint cimport int8_t, int64_t, uint8_t, uint16_t, uint32_t
from libc.string cimport memcpy, memset

from .kernels cimport PE_LANES, PE_PAGE, pe_kernels
from .memory cimport Block
from .simd cimport kernels

from ..errors import ArgumentError

KV_DTYPES = ("float32", "bfloat16", "int8")

cdef enum:
    MOST = PE_LANES  # positions that are stored at once

ctypedef fused Number:  # what a page of single numbers holds
    float
    int8_t


cdef int64_t page_bytes(const PageLayout *layout) noexcept nogil:
    return layout.n_layer * layout.n_kv_head * head_bytes(layout)


cdef int64_t store_scratch(const PageLayout *layout) noexcept nogil:
    """Floats that `store` needs."""
    return 0 if layout.dtype == KV_FLOAT32 else MOST * layout.value_width


cdef void store(const PageLayout *layout, void *page, int64_t layer, int64_t head, int64_t slot, const float *k, const float *v,
                int64_t stride, int64_t n, float *scratch) noexcept nogil:
    """Puts one head's keys and values of n rows, `stride` floats apart, into a page from position `slot` on. The rows lie in one
    panel of 16 positions."""
    cdef const pe_kernels *simd = kernels()
    cdef int64_t d = layout.head_dim, width = layout.value_width, r
    cdef char *keys = keys_of(layout, page, layer, head)
    cdef char *values = values_of(layout, keys)
    cdef uint16_t *k_bf16 = <uint16_t *>scratch  # [MOST, value_width]
    cdef uint16_t *v_bf16 = k_bf16 + MOST * width
    cdef int8_t *k_q8 = <int8_t *>scratch
    cdef int8_t *v_q8 = k_q8 + MOST * width
    cdef float *scales
    if layout.dtype == KV_FLOAT32:
        place(layout, <float *>keys, <float *>values, slot, k, v, stride, n)
    elif layout.dtype == KV_BFLOAT16:
        for r in range(n):
            simd.narrow_bf16(k + r * stride, d, k_bf16 + r * width)
            simd.narrow_bf16(v + r * stride, d, v_bf16 + r * width)
        store_bf16(layout, page, layer, head, slot, k_bf16, v_bf16, width, n)
    else:
        scales = scales_of(layout, keys) + slot
        for r in range(n):
            scales[r] = simd.narrow_q8(k + r * stride, d, k_q8 + r * width)
            scales[PE_PAGE + r] = simd.narrow_q8(v + r * stride, d, v_q8 + r * width)
        place(layout, <int8_t *>keys, <int8_t *>values, slot, <const int8_t *>k_q8, <const int8_t *>v_q8, width, n)


cdef void store_bf16(const PageLayout *layout, void *page, int64_t layer, int64_t head, int64_t slot, const uint16_t *k,
                     const uint16_t *v, int64_t stride, int64_t n) noexcept nogil:
    """The same for a page in bfloat16 of rows that are so already, of value_width numbers each; `stride` is even."""
    cdef char *keys = keys_of(layout, page, layer, head)
    place_key_pairs(layout, <uint32_t *>keys, slot, k, stride, n)
    place_value_pairs(layout, <uint32_t *>values_of(layout, keys), slot, v, stride, n)


cdef void place(const PageLayout *layout, Number *keys, Number *values, int64_t slot, const Number *k, const Number *v,
                int64_t stride, int64_t n) noexcept nogil:
    cdef int64_t d = layout.head_dim, i, r, part
    cdef Number *value
    keys += slot // PE_LANES * d * PE_LANES + slot % PE_LANES
    if n == PE_LANES and sizeof(Number) == sizeof(float):
        kernels().turn_words(k, stride, d, keys)
    else:
        for i in range(d):
            for r in range(n):
                keys[i * PE_LANES + r] = k[r * stride + i]
    for r in range(n):
        for i in range(layout.value_width // PE_LANES):
            part = min(<int64_t>PE_LANES, d - i * PE_LANES)
            value = values + (i * PE_PAGE + slot + r) * PE_LANES
            memcpy(value, v + r * stride + i * PE_LANES, part * sizeof(Number))
            memset(value + part, 0, (PE_LANES - part) * sizeof(Number))


cdef void place_key_pairs(const PageLayout *layout, uint32_t *keys, int64_t slot, const uint16_t *k, int64_t stride,
                          int64_t n) noexcept nogil:
    cdef int64_t n_pair = layout.key_width // 2, i, r
    cdef const uint32_t *pairs = <const uint32_t *>k
    keys += slot // PE_LANES * n_pair * PE_LANES + slot % PE_LANES
    if n == PE_LANES:
        kernels().turn_words(pairs, stride // 2, n_pair, keys)
        return
    for i in range(n_pair):
        for r in range(n):
            keys[i * PE_LANES + r] = pairs[r * (stride // 2) + i]


cdef void place_value_pairs(const PageLayout *layout, uint32_t *values, int64_t slot, const uint16_t *v, int64_t stride,
                            int64_t n) noexcept nogil:
    """A pair whose second position isn't here yet gets 0 for it: what was there before may be NaN."""
    cdef int64_t width = layout.value_width, pair, i, j
    cdef uint32_t *to
    cdef const uint16_t *even
    cdef const uint16_t *odd
    for pair in range(slot // 2, (slot + n + 1) // 2):
        even = v + (2 * pair - slot) * stride
        odd = even + stride
        for i in range(width // PE_LANES):
            to = values + (i * (PE_PAGE // 2) + pair) * PE_LANES
            if 2 * pair < slot:
                for j in range(PE_LANES):
                    to[j] = to[j] & 0xffff | <uint32_t>odd[i * PE_LANES + j] << 16
            elif 2 * pair + 1 >= slot + n:
                for j in range(PE_LANES):
                    to[j] = even[i * PE_LANES + j]
            else:
                for j in range(PE_LANES):
                    to[j] = even[i * PE_LANES + j] | <uint32_t>odd[i * PE_LANES + j] << 16


cdef class KVLayout:
    """What a KV page of a model with these dimensions looks like."""

    page_positions = PE_PAGE

    def __cinit__(self, int64_t n_layer, int64_t n_kv_head, int64_t head_dim, dtype):
        if dtype not in KV_DTYPES:
            raise ArgumentError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {dtype!r}")
        self.layout.dtype = {"float32": KV_FLOAT32, "bfloat16": KV_BFLOAT16, "int8": KV_INT8}[dtype]
        self.layout.n_layer, self.layout.n_kv_head, self.layout.head_dim = n_layer, n_kv_head, head_dim
        self.layout.key_width = (head_dim + 1) // 2 * 2 if dtype == "bfloat16" else head_dim
        self.layout.value_width = (head_dim + PE_LANES - 1) // PE_LANES * PE_LANES

    @property
    def page_nbytes(self):
        """The memory of one page."""
        return page_bytes(&self.layout)

    def copy(self, Block src, Block dst, int64_t n):
        """Copies the first n positions of a page to another page."""
        cdef size_t nbytes = self.page_nbytes
        if not 0 <= n <= PE_PAGE or src.nbytes < nbytes or dst.nbytes < nbytes:
            raise ArgumentError(f"n: expected 0..{PE_PAGE} positions of pages of {nbytes} bytes, got {n}")
        cdef const PageLayout *layout = &self.layout
        cdef int64_t row = PE_LANES * layout.dtype  # bytes of a panel's row
        cdef int64_t key_rows = (n + PE_LANES - 1) // PE_LANES * layout.key_width, i, at
        cdef int64_t value_rows = (n + 1) // 2 * 2  # pairs stay together
        cdef int64_t head = head_bytes(layout), scales = key_bytes(layout) + value_bytes(layout)
        cdef char *a = <char *>src.data
        cdef char *b = <char *>dst.data
        with nogil:
            for _ in range(layout.n_layer * layout.n_kv_head):
                memcpy(b, a, key_rows * row)
                for i in range(layout.value_width // PE_LANES):
                    at = key_bytes(layout) + i * PE_PAGE * row
                    memcpy(b + at, a + at, value_rows * row)
                memcpy(b + scales, a + scales, head - scales)
                a += head
                b += head

    def part_nbytes(self, int64_t n):
        """The bytes of `part_of` n positions."""
        if not 0 <= n <= PE_PAGE:
            raise ArgumentError(f"n: expected 0..{PE_PAGE} positions, got {n}")
        return self.page_nbytes // PE_PAGE * whole_panels(n)

    def part_of(self, Block page, int64_t n):
        """A copy of a page's first n positions alone: what a page of n positions, rounded up to 16, would look like. All
        64 are the page as it is. Positions after n are 0: the same keys and values always give the same bytes."""
        part = bytearray(self.part_nbytes(n))
        cdef uint8_t[::1] bytes_ = part
        if page.nbytes < self.page_nbytes:
            raise ArgumentError(f"page: expected {self.page_nbytes} bytes, got {page.nbytes}")
        if n:
            move_part(&self.layout, <char *>page.data, <char *>&bytes_[0], whole_panels(n), False)
            clear_after(&self.layout, <char *>&bytes_[0], n)
        return part

    def put_part(self, part, Block page, int64_t n):
        """Puts what `part_of` gave into a page."""
        cdef uint8_t[::1] bytes_ = part
        if bytes_.shape[0] != self.part_nbytes(n) or page.nbytes < self.page_nbytes:
            raise ArgumentError(f"part: expected {self.part_nbytes(n)} bytes for {n} positions, got {bytes_.shape[0]}")
        if n:
            move_part(&self.layout, <char *>page.data, <char *>&bytes_[0], whole_panels(n), True)


cdef inline int64_t whole_panels(int64_t n) noexcept nogil:
    return (n + PE_LANES - 1) // PE_LANES * PE_LANES


cdef void move_part(const PageLayout *layout, char *page, char *part, int64_t n, bint to_page) noexcept nogil:
    """Copies n positions, whole panels of keys, between a page and a part of one."""
    cdef int64_t i
    for _ in range(layout.n_layer * layout.n_kv_head):
        part = move(page, part, n * layout.key_width * layout.dtype, to_page)
        for i in range(layout.value_width // PE_LANES):
            part = move(page + key_bytes(layout) + i * PE_PAGE * PE_LANES * layout.dtype, part, n * PE_LANES * layout.dtype, to_page)
        if layout.dtype == KV_INT8:
            for i in range(2):
                part = move(page + key_bytes(layout) + value_bytes(layout) + i * PE_PAGE * 4, part, n * 4, to_page)
        page += head_bytes(layout)


cdef inline char *move(char *page, char *part, int64_t nbytes, bint to_page) noexcept nogil:
    """Copies to one of them; returns the end of the other's piece in the part."""
    memcpy(page if to_page else part, part if to_page else page, nbytes)
    return part + nbytes


cdef void clear_after(const PageLayout *layout, char *part, int64_t n) noexcept nogil:
    """Makes 0 of the positions from n on in a part of a page."""
    cdef int64_t together = 2 if layout.dtype == KV_BFLOAT16 else 1  # numbers of a lane of keys, positions of a row of values
    cdef int64_t end = whole_panels(n), lane = n % PE_LANES, size = layout.dtype, i
    cdef int64_t row = PE_LANES * together * size
    cdef char *keys
    for _ in range(layout.n_layer * layout.n_kv_head):
        if lane:
            keys = part + n // PE_LANES * PE_LANES * layout.key_width * size
            for i in range(layout.key_width // together):
                memset(keys + i * row + lane * together * size, 0, (PE_LANES - lane) * together * size)
        part += end * layout.key_width * size
        for i in range(layout.value_width // PE_LANES):
            clear_values(<char *>part, n, end, together, size)
            part += end * PE_LANES * size
        if layout.dtype == KV_INT8:
            for i in range(2):
                memset(part + 4 * n, 0, 4 * (end - n))
                part += 4 * end


cdef void clear_values(char *panel, int64_t n, int64_t end, int64_t together, int64_t size) noexcept nogil:
    """Makes 0 of the positions from n on in one panel of values."""
    cdef int64_t j
    if n % together:  # half a pair stays
        for j in range(PE_LANES):
            memset(panel + ((n - 1) * PE_LANES + 2 * j + 1) * size, 0, size)
        n += 1
    memset(panel + n * PE_LANES * size, 0, (end - n) * PE_LANES * size)
