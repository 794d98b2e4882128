/* Faults at the k-th file operation under a folder, whoever writes: Python, Rust or C++.
 *
 * Preloaded into a process (LD_PRELOAD). Settings are environment variables, read at every operation:
 *   FAULT_UNDER  absolute folder; operations elsewhere pass
 *   FAULT_AT     the operation to fail, counted from 1; 0 or unset only counts
 *   FAULT_KIND   kill, short (a write that takes half), or an errno as a number
 *   FAULT_STAYS  1: every operation from FAULT_AT on fails, not that one alone
 *   FAULT_COUNT  file of 8 bytes that holds the count of operations, shared with whoever looks
 *   FAULT_CLOCK  seconds by which the wall clock jumps back and forth with every reading
 * Build: cc -shared -fPIC -O1 -o faults.so faults.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long *counter(void) {
    static long *shared, own;
    static pid_t owner;
    if (shared && owner == getpid()) return shared;
    const char *path = getenv("FAULT_COUNT");
    owner = getpid();
    shared = &own;
    if (path) {
        int fd = syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT, 0600);
        if (fd >= 0) {
            if (!syscall(SYS_ftruncate, fd, sizeof(long))) {
                void *map = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
                if (map != MAP_FAILED) shared = map;
            }
            syscall(SYS_close, fd);
        }
    }
    return shared;
}

static int below(const char *path) {
    const char *folder = getenv("FAULT_UNDER");
    size_t length = folder ? strlen(folder) : 0;
    return length && !strncmp(path, folder, length) && (path[length] == '/' || !path[length]);
}

static int below_fd(int fd, const char *name) {
    char link[64], path[PATH_MAX * 2];
    if (!getenv("FAULT_UNDER")) return 0;
    if (name && name[0] == '/') return below(name);
    if (fd == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size < 0) return 0;
    path[size] = 0;
    if (name) snprintf(path + size, PATH_MAX, "/%s", name);
    return below(path);
}

/* 0: go on; 1: fail with errno set; 2: short write */
static int fault(int is_write) {
    const char *at = getenv("FAULT_AT"), *kind = getenv("FAULT_KIND"), *stays = getenv("FAULT_STAYS");
    long now = ++*counter(), when = at ? atol(at) : 0;
    if (!when || !kind || (stays && *stays == '1' ? now < when : now != when)) return 0;
    if (!strcmp(kind, "kill")) syscall(SYS_kill, getpid(), SIGKILL);
    if (!strcmp(kind, "short")) return is_write ? 2 : 0;
    errno = atoi(kind);
    return 1;
}

#define OPEN_LIKE(name, dir, ...) \
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); } \
    if (writes && below_fd(dir, path) && fault(0)) return -1; \
    return REAL(name)(__VA_ARGS__);

int open(const char *path, int flags, ...) { OPEN_LIKE(open, AT_FDCWD, path, flags, mode) }
int open64(const char *path, int flags, ...) { OPEN_LIKE(open64, AT_FDCWD, path, flags, mode) }
int openat(int dir, const char *path, int flags, ...) { OPEN_LIKE(openat, dir, dir, path, flags, mode) }
int openat64(int dir, const char *path, int flags, ...) { OPEN_LIKE(openat64, dir, dir, path, flags, mode) }

FILE *fopen(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+") && below_fd(AT_FDCWD, path) && fault(0)) return NULL;
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+") && below_fd(AT_FDCWD, path) && fault(0)) return NULL;
    return REAL(fopen64)(path, mode);
}

#define WRITE_LIKE(name, size, ...) \
    if (fd > 2 && below_fd(fd, NULL)) { int what = fault(1); if (what == 1) return -1; if (what == 2 && size > 1) size /= 2; } \
    return REAL(name)(__VA_ARGS__);

ssize_t write(int fd, const void *data, size_t size) { WRITE_LIKE(write, size, fd, data, size) }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { WRITE_LIKE(pwrite, size, fd, data, size, at) }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { WRITE_LIKE(pwrite64, size, fd, data, size, at) }
ssize_t writev(int fd, const struct iovec *parts, int number) { WRITE_LIKE(writev, number, fd, parts, number) }

#define PLAIN(test, name, ...) if ((test) && fault(0)) return -1; return REAL(name)(__VA_ARGS__);

int fsync(int fd) { PLAIN(below_fd(fd, NULL), fsync, fd) }
int fdatasync(int fd) { PLAIN(below_fd(fd, NULL), fdatasync, fd) }
int ftruncate(int fd, off_t size) { PLAIN(below_fd(fd, NULL), ftruncate, fd, size) }
int ftruncate64(int fd, off64_t size) { PLAIN(below_fd(fd, NULL), ftruncate64, fd, size) }
int rename(const char *from, const char *to) { PLAIN(below_fd(AT_FDCWD, to), rename, from, to) }
int renameat(int a, const char *from, int b, const char *to) { PLAIN(below_fd(b, to), renameat, a, from, b, to) }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { PLAIN(below_fd(b, to), renameat2, a, from, b, to, flags) }
int mkdir(const char *path, mode_t mode) { PLAIN(below_fd(AT_FDCWD, path), mkdir, path, mode) }
int mkdirat(int dir, const char *path, mode_t mode) { PLAIN(below_fd(dir, path), mkdirat, dir, path, mode) }
int unlink(const char *path) { PLAIN(below_fd(AT_FDCWD, path), unlink, path) }
int unlinkat(int dir, const char *path, int flags) { PLAIN(below_fd(dir, path), unlinkat, dir, path, flags) }
int rmdir(const char *path) { PLAIN(below_fd(AT_FDCWD, path), rmdir, path) }
int chmod(const char *path, mode_t mode) { PLAIN(below_fd(AT_FDCWD, path), chmod, path, mode) }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int reading;
    int failed = syscall(SYS_clock_gettime, clock, now);
    const char *jump = clock == CLOCK_REALTIME ? getenv("FAULT_CLOCK") : NULL;
    if (jump && !failed) now->tv_sec += (++reading % 2) ? -atol(jump) : atol(jump);
    return failed;
}
