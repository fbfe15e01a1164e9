// A pthread_create that fails from its FAIL_THREAD-th call on, for LD_PRELOAD; 0 begins to count anew.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
  static int (*create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
  static int calls;
  const char* fail = getenv("FAIL_THREAD");
  if (!fail || atoi(fail) == 0) calls = 0;
  else if (++calls >= atoi(fail)) return EAGAIN;
  if (!create) *(void**)&create = dlsym(RTLD_NEXT, "pthread_create");
  return create(thread, attributes, run, argument);
}
