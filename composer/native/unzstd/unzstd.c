/*
 * unzstd: zstd frames on standard input, their content on standard output. For hosts that have tar but no zstd:
 *
 *     tar -I ./unzstd -xf BUNDLE.tar.zst -C DIR        ./unzstd < BUNDLE.tar.zst | tar -xf - -C DIR
 *
 * Named `zstd` in a folder of PATH, it serves `tar --zstd` and whatever else runs `zstd -d` between two pipes.
 *
 * It is linked statically against musl, so it runs on any Linux of its machine. The format is RFC 8878: frames follow
 * one another, skippable ones hold no content, and the checksum of a frame is compared where it has one. Windows are
 * accepted up to the library's default of 128 MiB, as by the zstd program.
 */
#define _GNU_SOURCE /* F_SETPIPE_SZ */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "zstd.h"
#include "zstd_errors.h"

/* Exit codes; docs/reference/unzstd.md lists them. */
enum { BAD_INPUT = 1, BAD_USAGE = 2, BAD_HOST = 3 };

/* One block of a frame, and a few: what is decoded is still in the cache when it is written. */
enum { INPUT_SIZE = 128 << 10, OUTPUT_SIZE = 256 << 10, PIPE_SIZE = 1 << 20 };

static const char usage[] =
    "usage: unzstd [-dcq] < FILE.zst > FILE\n"
    "       tar -I ./unzstd -xf FILE.tar.zst\n"
    "\n"
    "  -d, -c, -q  accepted from those who take it for zstd: it does nothing else, and is quiet\n"
    "  --licence   print the licences of what this program is made from\n"
    "  --version   print the version\n"
    "  --help      print this\n"
    "\n"
    "Exit codes: 1 the input is damaged, cut off or not zstd; 2 usage; 3 reading, writing or memory failed.\n";

static const char zstd_licence[] = {
#embed "LICENSE.zstd"
};
static const char musl_licence[] = {
#embed "COPYRIGHT.musl"
};
static const char zig_licence[] = {
#embed "LICENSE.zig"
};

/* How far the input was read. frame: the current one, from 1; frame_start and read are bytes. */
struct position {
    unsigned long long frame;
    unsigned long long frame_start;
    unsigned long long read;
};

static char input[INPUT_SIZE];
static char output[OUTPUT_SIZE];

__attribute__((noreturn, format(printf, 2, 3))) static void fail(int code, const char *format, ...)
{
    va_list arguments;
    fputs("unzstd: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(code);
}

static const char copy_again[] = "  fix: Copy the file again, and compare its SHA-256 with the one that was published.";

static size_t read_some(void)
{
    ssize_t count;
    do {
        count = read(STDIN_FILENO, input, sizeof input);
    } while (count < 0 && errno == EINTR);
    if (count < 0)
        fail(BAD_HOST, "cannot read standard input: %s", strerror(errno));
    return (size_t)count;
}

static void write_all(const char *data, size_t size)
{
    while (size > 0) {
        ssize_t count = write(STDOUT_FILENO, data, size);
        if (count < 0 && errno == EINTR)
            continue;
        if (count < 0)
            fail(BAD_HOST, "cannot write standard output: %s", strerror(errno));
        data += count;
        size -= (size_t)count;
    }
}

__attribute__((noreturn)) static void refuse(size_t fault, const struct position *at)
{
    ZSTD_ErrorCode code = ZSTD_getErrorCode(fault);
    if (code == ZSTD_error_memory_allocation)
        fail(BAD_HOST, "not enough memory for the window of frame %llu", at->frame);
    if (code == ZSTD_error_prefix_unknown && at->frame == 1)
        fail(BAD_INPUT, "the input is not zstd data");
    if (code == ZSTD_error_frameParameter_windowTooLarge)
        fail(BAD_INPUT, "frame %llu, at byte %llu, needs a window of more than 128 MiB", at->frame, at->frame_start);
    fail(BAD_INPUT, "the input is damaged in frame %llu, which begins at byte %llu: %s\n%s", at->frame,
         at->frame_start, ZSTD_getErrorName(fault), copy_again);
}

/* Decode the `size` bytes of input and write what comes of them. Returns 0 where they end with a frame. */
static size_t decode(ZSTD_DCtx *context, size_t size, struct position *at)
{
    ZSTD_inBuffer in = {input, size, 0};
    ZSTD_outBuffer out;
    size_t left;
    do {
        out = (ZSTD_outBuffer){output, sizeof output, 0};
        left = ZSTD_decompressStream(context, &out, &in);
        if (ZSTD_isError(left))
            refuse(left, at);
        write_all(output, out.pos);
        if (left == 0) {
            at->frame++;
            at->frame_start = at->read + in.pos;
        }
        /* At the end of a frame nothing waits for room, and a call without input would begin the next one. */
    } while (in.pos < in.size || (left != 0 && out.pos == out.size));
    at->read += size;
    return left;
}

static void decompress(void)
{
    struct position at = {.frame = 1};
    ZSTD_DCtx *context = ZSTD_createDCtx();
    size_t size, left = 1; /* no frame at all is a cut, too */
    if (context == NULL)
        fail(BAD_HOST, "not enough memory");
    while ((size = read_some()) > 0)
        left = decode(context, size, &at);
    if (at.read == 0)
        fail(BAD_INPUT, "the input is empty");
    if (left != 0)
        fail(BAD_INPUT, "the input ends at byte %llu, within frame %llu: it was cut off\n%s", at.read, at.frame,
             copy_again);
    ZSTD_freeDCtx(context);
}

static void print_licence(const char *name, const char *text, size_t size)
{
    printf("\n==== %s ====\n\n", name);
    fwrite(text, 1, size, stdout);
}

static void print_licences(void)
{
    fputs("unzstd is a program of wheel-composer (MIT licence) and holds code of the projects below.\n", stdout);
    print_licence("zstd", zstd_licence, sizeof zstd_licence);
    print_licence("musl", musl_licence, sizeof musl_licence);
    print_licence("compiler-rt of Zig", zig_licence, sizeof zig_licence);
}

static void check_streams(void)
{
    if (isatty(STDIN_FILENO))
        fail(BAD_USAGE, "standard input is a terminal\n%s", usage);
    if (isatty(STDOUT_FILENO))
        fail(BAD_USAGE, "standard output is a terminal\n%s", usage);
    /* Fewer switches between this program and its neighbours; refused where they are no pipes, which is no fault. */
    (void)fcntl(STDIN_FILENO, F_SETPIPE_SZ, PIPE_SIZE);
    (void)fcntl(STDOUT_FILENO, F_SETPIPE_SZ, PIPE_SIZE);
}

/* What an option prints; 0 for one that is only accepted. */
static int answer(int option)
{
    switch (option) {
    case 'l':
        print_licences();
        return 1;
    case 'V':
        printf("unzstd of wheel-composer, with zstd %s\n", ZSTD_versionString());
        return 1;
    case 'h':
        fputs(usage, stdout);
        return 1;
    case '?':
        fputs(usage, stderr);
        exit(BAD_USAGE);
    default:
        return 0;
    }
}

int main(int count, char **arguments)
{
    static const struct option names[] = {
        {"decompress", no_argument, NULL, 'd'}, {"stdout", no_argument, NULL, 'c'},
        {"quiet", no_argument, NULL, 'q'},      {"licence", no_argument, NULL, 'l'},
        {"license", no_argument, NULL, 'l'},    {"version", no_argument, NULL, 'V'},
        {"help", no_argument, NULL, 'h'},       {NULL, 0, NULL, 0},
    };
    int option;
    while ((option = getopt_long(count, arguments, "dcqhV", names, NULL)) != -1)
        if (answer(option))
            return fflush(stdout) == 0 ? 0 : BAD_HOST;
    if (optind < count)
        fail(BAD_USAGE, "%s: files are not opened, only standard input is read\n%s", arguments[optind], usage);
    check_streams();
    decompress();
    return 0;
}
