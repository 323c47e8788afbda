/* Android's C library for one program, LiteRT's benchmark_model: what glibc has under other names or in other shapes.

   Everything else of libc.so is glibc's own. Layouts: https://android.googlesource.com/platform/bionic, libc/include. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The compiler's stack guard lies at thread pointer + 0x28, which is in this block; nobody writes to it. */
__thread char guard_space[256] __attribute__((aligned(16), tls_model("initial-exec")));

char __sF[3][152]; /* stdin, stdout, stderr */

static void *glibc(const char *name) {
  static void *handle;
  if (!handle) handle = dlopen("libc.so.6", RTLD_NOW);
  return dlsym(handle, name);
}
#define REAL(name) ((__typeof__(&name))glibc(#name))

static FILE *file(FILE *given) {
  char *address = (char *)given;
  if (address < __sF[0] || address >= __sF[3]) return given;
  const char *names[] = {"stdin", "stdout", "stderr"};
  return *(FILE **)glibc(names[(address - __sF[0]) / sizeof __sF[0]]);
}

int fclose(FILE *f) { return REAL(fclose)(file(f)); }
int fflush(FILE *f) { return REAL(fflush)(f ? file(f) : f); }
int fileno(FILE *f) { return REAL(fileno)(file(f)); }
int fputc(int c, FILE *f) { return REAL(fputc)(c, file(f)); }
int fputs(const char *s, FILE *f) { return REAL(fputs)(s, file(f)); }
size_t fread(void *p, size_t size, size_t n, FILE *f) { return REAL(fread)(p, size, n, file(f)); }
size_t fwrite(const void *p, size_t size, size_t n, FILE *f) { return REAL(fwrite)(p, size, n, file(f)); }
int fseek(FILE *f, long offset, int from) { return REAL(fseek)(file(f), offset, from); }
int fseeko(FILE *f, off_t offset, int from) { return REAL(fseeko)(file(f), offset, from); }
off_t ftello(FILE *f) { return REAL(ftello)(file(f)); }
int getc(FILE *f) { return REAL(getc)(file(f)); }
int ungetc(int c, FILE *f) { return REAL(ungetc)(c, file(f)); }
int vfprintf(FILE *f, const char *format, va_list values) { return REAL(vfprintf)(file(f), format, values); }
int fprintf(FILE *f, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int count = vfprintf(f, format, values);
  va_end(values);
  return count;
}
int fscanf(FILE *f, const char *format, ...) {
  va_list values;
  va_start(values, format);
  int count = REAL(vfscanf)(file(f), format, values);
  va_end(values);
  return count;
}

int *__errno(void) { return __errno_location(); }
size_t __strlen_chk(const char *s, size_t size) { return (void)size, strlen(s); }
int __system_property_get(const char *name, char *value) { return (void)name, value[0] = 0; }
void android_set_abort_message(const char *message) { (void)message; }
int __android_log_write(int level, const char *tag, const char *text) { return (void)level, (void)tag, (void)text, 0; }
int __android_log_print(int level, const char *tag, const char *format, ...) { return (void)level, (void)tag, (void)format, 0; }
int __android_log_vprint(int level, const char *tag, const char *format, va_list values) {
  return (void)level, (void)tag, (void)format, (void)values, 0;
}

/* A set of signals has 8 bytes, glibc's 128. */
int sigfillset(sigset_t *set) { return memset(set, 0xff, 8), 0; }
int pthread_sigmask(int how, const sigset_t *now, sigset_t *before) {
  return syscall(SYS_rt_sigprocmask, how, now, before, 8L) ? errno : 0;
}

static int posix_strerror_r(int number, char *text, size_t size) {
  return ((int (*)(int, char *, size_t))glibc("__xpg_strerror_r"))(number, text, size);
}
static struct mallinfo2 wide_mallinfo(void) { return mallinfo2(); }
__asm__(".global strerror_r, mallinfo\n.set strerror_r, posix_strerror_r\n.set mallinfo, wide_mallinfo");
void *const kept[] = {posix_strerror_r, wide_mallinfo};

long sysconf(int name) {
  switch (name) { /* bits/sysconf.h numbers them otherwise */
    case 0x06: return REAL(sysconf)(_SC_CLK_TCK);
    case 0x27: case 0x28: return REAL(sysconf)(_SC_PAGESIZE);
    case 0x60: return REAL(sysconf)(_SC_NPROCESSORS_CONF);
    case 0x61: return REAL(sysconf)(_SC_NPROCESSORS_ONLN);
    case 0x62: return REAL(sysconf)(_SC_PHYS_PAGES);
    case 0x63: return REAL(sysconf)(_SC_AVPHYS_PAGES);
    default: return -1;
  }
}

/* Lists of constructors begin with -1 and end with 0 in programs of those years; glibc's loader leaves them alone. */
typedef void (*Constructor)(int, char **, char **);
typedef struct { Constructor *before, *constructors; } Arrays;

void __libc_init(void *stack, void (*unused)(void), int (*program)(int, char **, char **), const Arrays *arrays) {
  (void)unused;
  guard_space[0] = 0;
  int count = (int)*(long *)stack;
  char **values = (char **)stack + 1, **environment = values + count + 1;
  for (Constructor *one = arrays->constructors; *one; one++)
    if (*one != (Constructor)-1) (*one)(count, values, environment);
  exit(program(count, values, environment));
}
