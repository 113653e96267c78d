/* Included before each C source of the extension (`gcc -include`) when it is built for the simulated disk. System calls on files
and directories become calls of functions in `simulated_calls.c`. The sources are those of the package, unchanged, and the
installed extension contains nothing of this. */

#ifndef PILLARBOX_SIMULATED_CALLS_H
#define PILLARBOX_SIMULATED_CALLS_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

/* These declarations come first, so that the macros below replace only calls. */
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

int simulated_open(const char *path, int flags, ...);
int simulated_close(int fd);
int simulated_fcntl(int fd);
int simulated_flock(int fd, int operation);
int simulated_fstat(int fd, struct stat *info);
int simulated_lstat(const char *path, struct stat *info);
int simulated_fstatat(int directory, const char *name, struct stat *info, int flags);
int simulated_rename(const char *source, const char *target);
int simulated_fchown(int fd, uid_t user, gid_t group);
int simulated_sync_file_range(int fd, off_t offset, off_t count, unsigned flags);
int simulated_fdatasync(int fd);
int simulated_fsync(int fd);
ssize_t simulated_pread(int fd, void *buffer, size_t count, off_t offset);
ssize_t simulated_write(int fd, const void *buffer, size_t count);
int simulated_ftruncate(int fd, off_t size);
DIR *simulated_opendir(const char *path);
struct dirent *simulated_readdir(DIR *directory);
int simulated_closedir(DIR *directory);
int simulated_dirfd(DIR *directory);

#ifndef PILLARBOX_SIMULATED_CALLS_C
#define open(...) simulated_open(__VA_ARGS__)
#define close(fd) simulated_close(fd)
#define fcntl(fd, ...) simulated_fcntl(fd)
#define flock(fd, operation) simulated_flock(fd, operation)
#define fstat(fd, info) simulated_fstat(fd, info)
#define lstat(path, info) simulated_lstat(path, info)
#define fstatat(directory, name, info, flags) simulated_fstatat(directory, name, info, flags)
#define rename(source, target) simulated_rename(source, target)
#define fchown(fd, user, group) simulated_fchown(fd, user, group)
#define sync_file_range(fd, offset, count, flags) simulated_sync_file_range(fd, offset, count, flags)
#define fdatasync(fd) simulated_fdatasync(fd)
#define fsync(fd) simulated_fsync(fd)
#define pread(fd, buffer, count, offset) simulated_pread(fd, buffer, count, offset)
#define write(fd, buffer, count) simulated_write(fd, buffer, count)
#define ftruncate(fd, size) simulated_ftruncate(fd, size)
#define opendir(path) simulated_opendir(path)
#define readdir(directory) simulated_readdir(directory)
#define closedir(directory) simulated_closedir(directory)
#define dirfd(directory) simulated_dirfd(directory)
#endif

#endif
