/* Reading a part of an open file, by several threads at once. */
#ifndef PE_FILES_H
#define PE_FILES_H

#include <stdint.h>

#define PE_MOST_READ ((int64_t)1 << 30) /* bytes of one call: macOS and Windows take no more than 2^31 */

#if defined(_WIN32)
#include <io.h>
#include <string.h>
#include <windows.h>
static inline int64_t pe_read_some(int fd, char *to, int64_t n, int64_t offset)
{
    OVERLAPPED at;
    DWORD got = 0;
    memset(&at, 0, sizeof at);
    at.Offset = (DWORD)offset;
    at.OffsetHigh = (DWORD)(offset >> 32);
    return ReadFile((HANDLE)_get_osfhandle(fd), to, (DWORD)n, &got, &at) ? (int64_t)got : -1;
}
#else
#include <errno.h>
#include <unistd.h>
static inline int64_t pe_read_some(int fd, char *to, int64_t n, int64_t offset)
{
    ssize_t got;
    do
        got = pread(fd, to, (size_t)n, (off_t)offset);
    while (got < 0 && errno == EINTR);
    return (int64_t)got;
}
#endif

/* Reads n bytes from `offset` on; 0 if the file ends before, or can't be read. */
static inline int pe_read(int fd, char *to, int64_t n, int64_t offset)
{
    while (n > 0) {
        const int64_t got = pe_read_some(fd, to, n < PE_MOST_READ ? n : PE_MOST_READ, offset);
        if (got <= 0)
            return 0;
        to += got, offset += got, n -= got;
    }
    return 1;
}

#endif
