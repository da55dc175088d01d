/* Interposed in front of the C library, this makes the local disk behave like another file system. The variable FAULT,
 * which is read at every call, says which one:
 *
 *   nfs        an exclusive flock needs a descriptor that is open for writing
 *   no-locks   flock is refused
 *   directory  a directory can't be synced
 *   no-modes   chmod is refused
 *   no-rename  a file can't be renamed over another one
 *   no-move    a directory can't be renamed
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static int fault(const char *name) {
    const char *set = getenv("FAULT");
    return set != NULL && strcmp(set, name) == 0;
}

static int refuse(int error) {
    errno = error;
    return -1;
}

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

int flock(int descriptor, int operation) {
    if (fault("no-locks")) return refuse(ENOLCK);
    if (fault("nfs") && (operation & LOCK_EX) && (fcntl(descriptor, F_GETFL) & O_ACCMODE) == O_RDONLY)
        return refuse(EBADF);
    return REAL("flock", int (*)(int, int))(descriptor, operation);
}

int fsync(int descriptor) {
    struct stat status;
    if (fault("directory") && fstat(descriptor, &status) == 0 && S_ISDIR(status.st_mode)) return refuse(EINVAL);
    return REAL("fsync", int (*)(int))(descriptor);
}

int chmod(const char *path, mode_t mode) {
    if (fault("no-modes")) return refuse(EPERM);
    return REAL("chmod", int (*)(const char *, mode_t))(path, mode);
}

int fchmodat(int directory, const char *path, mode_t mode, int flags) {
    if (fault("no-modes")) return refuse(EPERM);
    return REAL("fchmodat", int (*)(int, const char *, mode_t, int))(directory, path, mode, flags);
}

int rename(const char *from, const char *to) {
    struct stat status;
    if (fault("no-rename") && stat(to, &status) == 0) return refuse(EACCES);
    if (fault("no-move") && stat(from, &status) == 0 && S_ISDIR(status.st_mode)) return refuse(ENOSYS);
    return REAL("rename", int (*)(const char *, const char *))(from, to);
}
