/* What a process asks of the disk below one folder: written down in order, and refused on demand.
 *
 * LD_PRELOAD this with DISK_WATCH=FOLDER (absolute, resolved) and DISK_LOG=FILE. Each call that changes the
 * folder, or makes a change durable, becomes one record of the log (see replay.py for its form). Calls go
 * through one lock, so the order of the log is the order in which they happened.
 *
 * disk_mark(text) writes down what the program has told somebody. disk_fault(at, error, lasting) refuses the
 * at-th call from now with that errno, once or until disk_fault(0, 0, 0); disk_count() says how many there
 * were. A write that is refused has brought the first half of its bytes where `at` is even.
 *
 * With DISK_FULL=FILE there is no room (ENOSPC) for as long as that file exists.
 *
 * Not seen: mmap (SQLite maps only the -shm file, which is made anew) and calls inside libc (fopen).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char watch[PATH_MAX];
static size_t watch_size;
static const char *full_file;
static int out = -1;
static long fault_at, counted;
static int fault_error, fault_lasting, fault_pending;


__attribute__((constructor)) static void begin(void)
{
    const char *folder = getenv("DISK_WATCH"), *log = getenv("DISK_LOG");
    if (!folder) return;
    snprintf(watch, sizeof watch, "%s", folder);
    watch_size = strlen(watch);
    full_file = getenv("DISK_FULL");
    if (log) out = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static int below(const char *full)
{
    return strncmp(full, watch, watch_size) == 0 && (full[watch_size] == '/' || !full[watch_size]);
}

/* The absolute path of `path` from `dirfd`; NULL unless it is below the watched folder, or the folder. */
static const char *named(int dirfd, const char *path, char *full)
{
    if (!watch_size || !path) return NULL;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char link[64], base[PATH_MAX];
        snprintf(link, sizeof link, dirfd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dirfd);
        ssize_t size = readlink(link, base, sizeof base - 1);
        if (size < 0) return NULL;
        base[size] = 0;
        if (snprintf(full, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return NULL;
    }
    return below(full) ? full : NULL;
}

/* The path of an open file as it is called now; a removed one ends in " (deleted)", which replay.py drops. */
static const char *opened(int fd, char *full)
{
    char link[64];
    if (!watch_size) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, full, PATH_MAX - 1);
    if (size <= 0 || full[0] != '/') return NULL;
    full[size] = 0;
    return below(full) ? full : NULL;
}

static void note(char op, const char *path, const char *more, uint64_t at, const void *data, uint64_t size)
{
    if (out < 0) return;
    struct __attribute__((packed)) { char op; uint32_t path, more; uint64_t at, size; } head = {
        op, (uint32_t)strlen(path), more ? (uint32_t)strlen(more) : 0, at, size };
    struct iovec parts[] = {
        { &head, sizeof head }, { (void *)path, head.path }, { (void *)more, head.more }, { (void *)data, size } };
    int before = errno;
    if (syscall(SYS_writev, out, parts, 4) != (long)(sizeof head + head.path + head.more + size)) abort();
    errno = before;
}

/* Whether this call is to be refused; errno is set. Bytes can run out only where `grows`. */
static int refused(int grows)
{
    if (full_file && grows && !syscall(SYS_faccessat, AT_FDCWD, full_file, F_OK)) { errno = ENOSPC; return 1; }
    if (fault_error == ENOSPC && !grows) return 0;
    counted++;
    if (!fault_at || (fault_lasting ? counted < fault_at : counted != fault_at)) return 0;
    errno = fault_error;
    return 1;
}

void disk_mark(const char *text)
{
    pthread_mutex_lock(&lock);
    note('m', "", NULL, 0, text, strlen(text));
    pthread_mutex_unlock(&lock);
}

void disk_fault(long at, int error, int lasting)
{
    pthread_mutex_lock(&lock);
    fault_at = at; fault_error = error; fault_lasting = lasting; counted = 0; fault_pending = 0;
    pthread_mutex_unlock(&lock);
}

long disk_count(void) { return counted; }

/* opening */

static int open_it(int dirfd, const char *path, int flags, mode_t mode)
{
    char full[PATH_MAX];
    if (!(flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) || (flags & O_TMPFILE) == O_TMPFILE
        || !named(dirfd, path, full))
        return (int)syscall(SYS_openat, dirfd, path, flags, mode);
    pthread_mutex_lock(&lock);
    struct stat found;
    int before = errno, exists = fstatat(dirfd, path, &found, 0) == 0, fd = -1;
    errno = before;
    if (!refused(!exists)) {
        fd = (int)syscall(SYS_openat, dirfd, path, flags, mode);
        if (fd >= 0 && !exists) note('c', full, NULL, 0, NULL, 0);
        else if (fd >= 0 && (flags & O_TRUNC)) note('t', full, NULL, 0, NULL, 0);
    }
    pthread_mutex_unlock(&lock);
    return fd;
}

#define MODE mode_t mode = 0; \
    if (flags & O_CREAT) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { MODE return open_it(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return open_it(AT_FDCWD, path, flags, mode); }
int openat(int dirfd, const char *path, int flags, ...) { MODE return open_it(dirfd, path, flags, mode); }
int openat64(int dirfd, const char *path, int flags, ...) { MODE return open_it(dirfd, path, flags, mode); }
int __open_2(const char *path, int flags) { return open_it(AT_FDCWD, path, flags, 0); }
int __open64_2(const char *path, int flags) { return open_it(AT_FDCWD, path, flags, 0); }
int creat(const char *path, mode_t mode) { return open_it(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return creat(path, mode); }

/* bytes */

/* `at` below 0: at the file's position, which moves. */
static ssize_t write_it(int fd, const void *data, size_t size, off_t at)
{
    char full[PATH_MAX];
    if (!opened(fd, full))
        return at < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, at);
    pthread_mutex_lock(&lock);
    ssize_t done = -1;
    int no = fault_pending || refused(1);
    if (fault_pending) errno = fault_error;
    else if (no && counted == fault_at && counted % 2 == 0 && size > 1) {
        fault_pending = 1; /* the first half comes through, the rest is refused */
        size /= 2;
        no = 0;
    }
    if (no) fault_pending = 0;
    else {
        done = at < 0 ? syscall(SYS_write, fd, data, size) : syscall(SYS_pwrite64, fd, data, size, at);
        if (done > 0)
            note('w', full, NULL, (uint64_t)(at < 0 ? lseek(fd, 0, SEEK_CUR) - done : at), data, (uint64_t)done);
    }
    pthread_mutex_unlock(&lock);
    return done;
}

ssize_t write(int fd, const void *data, size_t size) { return write_it(fd, data, size, -1); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return write_it(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return write_it(fd, data, size, at); }

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    char full[PATH_MAX];
    if (!opened(fd, full)) return syscall(SYS_writev, fd, parts, count);
    ssize_t total = 0;
    for (int i = 0; i < count; i++) {
        ssize_t done = write_it(fd, parts[i].iov_base, parts[i].iov_len, -1);
        if (done < 0) return total ? total : -1;
        total += done;
        if ((size_t)done < parts[i].iov_len) break;
    }
    return total;
}

/* Copies inside the kernel are refused as on a file system that cannot: callers fall back to writes. */
ssize_t sendfile64(int to, int from, off64_t *at, size_t size)
{
    char full[PATH_MAX];
    if (opened(to, full)) { errno = ENOTSOCK; return -1; }
    return syscall(SYS_sendfile, to, from, at, size);
}
ssize_t sendfile(int to, int from, off_t *at, size_t size) { return sendfile64(to, from, at, size); }

static int size_it(int fd, off_t size)
{
    char full[PATH_MAX];
    if (!opened(fd, full)) return (int)syscall(SYS_ftruncate, fd, size);
    pthread_mutex_lock(&lock);
    int done = refused(0) ? -1 : (int)syscall(SYS_ftruncate, fd, size);
    if (!done) note('t', full, NULL, (uint64_t)size, NULL, 0);
    pthread_mutex_unlock(&lock);
    return done;
}
int ftruncate(int fd, off_t size) { return size_it(fd, size); }
int ftruncate64(int fd, off64_t size) { return size_it(fd, size); }

/* durability */

static int sync_it(int fd, long call)
{
    char full[PATH_MAX];
    if (!opened(fd, full)) return (int)syscall(call, fd);
    pthread_mutex_lock(&lock);
    /* The log alone remembers what would be on the disk: the tests need not wait for a real one. */
    int done = refused(1) ? -1 : 0;
    if (!done) note('s', full, NULL, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    return done;
}
int fsync(int fd) { return sync_it(fd, SYS_fsync); }
int fdatasync(int fd) { return sync_it(fd, SYS_fdatasync); }

/* names */

#define NAMED(grows, op, a, b, call) \
    pthread_mutex_lock(&lock); \
    int done = refused(grows) ? -1 : (int)(call); \
    if (!done) note(op, a, b, 0, NULL, 0); \
    pthread_mutex_unlock(&lock); \
    return done

int renameat(int d1, const char *from, int d2, const char *to)
{
    char one[PATH_MAX], two[PATH_MAX];
    const char *a = named(d1, from, one), *b = named(d2, to, two);
    if (!a || !b) return (int)syscall(SYS_renameat2, d1, from, d2, to, 0);
    NAMED(1, 'r', a, b, syscall(SYS_renameat2, d1, from, d2, to, 0));
}
int rename(const char *from, const char *to) { return renameat(AT_FDCWD, from, AT_FDCWD, to); }

int unlinkat(int dirfd, const char *path, int flags)
{
    char full[PATH_MAX];
    if (!named(dirfd, path, full)) return (int)syscall(SYS_unlinkat, dirfd, path, flags);
    NAMED(0, 'u', full, NULL, syscall(SYS_unlinkat, dirfd, path, flags));
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }
int remove(const char *path)
{
    int done = unlinkat(AT_FDCWD, path, 0);
    return done < 0 && errno == EISDIR ? rmdir(path) : done;
}

int mkdirat(int dirfd, const char *path, mode_t mode)
{
    char full[PATH_MAX];
    if (!named(dirfd, path, full)) return (int)syscall(SYS_mkdirat, dirfd, path, mode);
    struct stat found;
    if (!fstatat(dirfd, path, &found, 0)) { errno = EEXIST; return -1; }
    NAMED(1, 'd', full, NULL, syscall(SYS_mkdirat, dirfd, path, mode));
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int symlinkat(const char *target, int dirfd, const char *path)
{
    char full[PATH_MAX];
    if (!named(dirfd, path, full)) return (int)syscall(SYS_symlinkat, target, dirfd, path);
    NAMED(1, 'y', full, target, syscall(SYS_symlinkat, target, dirfd, path));
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int linkat(int d1, const char *from, int d2, const char *to, int flags)
{
    char one[PATH_MAX], two[PATH_MAX];
    const char *a = named(d1, from, one), *b = named(d2, to, two);
    if (!a || !b) return (int)syscall(SYS_linkat, d1, from, d2, to, flags);
    NAMED(1, 'l', a, b, syscall(SYS_linkat, d1, from, d2, to, flags));
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }
