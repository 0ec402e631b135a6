/* A clock of the day that is ahead of the machine's by as many seconds as the file CLOCK_AHEAD says, which may change.
 *
 * A library that is loaded before others (LD_PRELOAD). Only CLOCK_REALTIME is set: a machine's monotonic clock never jumps.
 * Who waits until a time of that clock waits as long as it would without this.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t ahead(void) {
    char text[32] = {0};
    const char *path = getenv("CLOCK_AHEAD");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0)
        return 0;
    if (read(file, text, sizeof text - 1) < 0)
        text[0] = 0;
    close(file);
    return atol(text);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && clock == CLOCK_REALTIME)
        now->tv_sec += ahead();
    return failed;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found;
    (void)zone;
    clock_gettime(CLOCK_REALTIME, &found);
    now->tv_sec = found.tv_sec;
    now->tv_usec = found.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *place) {
    struct timespec found;
    clock_gettime(CLOCK_REALTIME, &found);
    if (place)
        *place = found.tv_sec;
    return found.tv_sec;
}

/* A condition may wait by another clock, whose seconds are those since the machine's start: fewer than those since 1970. */
static struct timespec of_the_machine(const struct timespec *until) {
    struct timespec found = *until;
    if (found.tv_sec > 500000000)
        found.tv_sec -= ahead();
    return found;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec machine = of_the_machine(until);
    if (!next)
        next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    return next(condition, mutex, &machine);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    static int (*next)(sem_t *, const struct timespec *);
    struct timespec machine = of_the_machine(until);
    if (!next)
        next = dlsym(RTLD_NEXT, "sem_timedwait");
    return next(semaphore, &machine);
}
