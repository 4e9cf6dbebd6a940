/* Draws by DRM's own calls, without a library: a mode is set on the first connector with a dumb
 * buffer behind it (Linux, include/uapi/drm/drm_mode.h), and each command of standard input draws
 * into the buffer and says where.
 *
 *   rect X Y WIDTH HEIGHT COLOUR   one colour, hexadecimal
 *   many COUNT                     as many pictures of one line each, from the top down, around
 *
 * "drawn" follows each, and what is drawn first: blue is x, green is y, red is x ^ y.
 */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

struct mode {
    uint32_t clock;
    uint16_t width, hsync_start, hsync_end, htotal, hskew;
    uint16_t height, vsync_start, vsync_end, vtotal, vscan;
    uint32_t vrefresh, flags, type;
    char name[32];
};
struct resources {
    uint64_t fbs, crtcs, connectors, encoders;
    uint32_t count_fbs, count_crtcs, count_connectors, count_encoders;
    uint32_t min_width, max_width, min_height, max_height;
};
struct connector {
    uint64_t encoders, modes, props, prop_values;
    uint32_t count_modes, count_props, count_encoders;
    uint32_t encoder, id, type, type_id, connection, mm_width, mm_height, subpixel, pad;
};
struct crtc {
    uint64_t connectors;
    uint32_t count_connectors, id, fb, x, y, gamma_size, mode_valid;
    struct mode mode;
};
struct dumb {
    uint32_t height, width, bpp, flags, handle, pitch;
    uint64_t size;
};
struct map {
    uint32_t handle, pad;
    uint64_t offset;
};
struct fb {
    uint32_t id, width, height, pitch, bpp, depth, handle;
};
struct clip {
    uint16_t x1, y1, x2, y2;
};
struct dirty {
    uint32_t fb, flags, colour, count;
    uint64_t clips;
};
#define GET_RESOURCES _IOWR('d', 0xA0, struct resources)
#define SET_CRTC _IOWR('d', 0xA2, struct crtc)
#define GET_CONNECTOR _IOWR('d', 0xA7, struct connector)
#define ADD_FB _IOWR('d', 0xAE, struct fb)
#define DIRTY_FB _IOWR('d', 0xB1, struct dirty)
#define CREATE_DUMB _IOWR('d', 0xB2, struct dumb)
#define MAP_DUMB _IOWR('d', 0xB3, struct map)

static int card;
static struct dumb buffer = {.bpp = 32};
static struct fb fb = {.bpp = 32, .depth = 24};
static uint8_t *points;

static void call(unsigned long number, void *argument, const char *what)
{
    if (ioctl(card, number, argument)) {
        perror(what);
        exit(1);
    }
}

static void told(unsigned x, unsigned y, unsigned width, unsigned height)
{
    struct clip clip = {x, y, x + width, y + height};
    struct dirty dirty = {.fb = fb.id, .count = 1, .clips = (uintptr_t)&clip};
    call(DIRTY_FB, &dirty, "DIRTYFB");
}

static uint32_t *line(unsigned y)
{
    return (uint32_t *)(points + (size_t)y * buffer.pitch);
}

static void rect(unsigned x, unsigned y, unsigned width, unsigned height, uint32_t colour)
{
    for (unsigned row = y; row < y + height; row++)
        for (unsigned column = x; column < x + width; column++)
            line(row)[column] = colour;
    told(x, y, width, height);
}

int main(void)
{
    uint32_t crtcs[8], connectors[8];
    struct mode modes[64];
    struct resources found = {0};
    struct connector connector = {0};
    struct crtc crtc = {.mode_valid = 1};

    card = open("/dev/dri/card0", O_RDWR);
    found.crtcs = (uintptr_t)crtcs, found.count_crtcs = 8;
    found.connectors = (uintptr_t)connectors, found.count_connectors = 8;
    call(GET_RESOURCES, &found, "GETRESOURCES");
    connector.id = connectors[0];
    connector.modes = (uintptr_t)modes, connector.count_modes = 64;
    call(GET_CONNECTOR, &connector, "GETCONNECTOR");
    crtc.mode = modes[0];
    buffer.width = crtc.mode.width, buffer.height = crtc.mode.height;
    call(CREATE_DUMB, &buffer, "CREATE_DUMB");
    fb.width = buffer.width, fb.height = buffer.height;
    fb.pitch = buffer.pitch, fb.handle = buffer.handle;
    call(ADD_FB, &fb, "ADDFB");
    struct map map = {.handle = buffer.handle};
    call(MAP_DUMB, &map, "MAP_DUMB");
    points = mmap(0, buffer.size, PROT_READ | PROT_WRITE, MAP_SHARED, card, map.offset);
    if (points == MAP_FAILED)
        return perror("mmap"), 1;
    for (unsigned y = 0; y < buffer.height; y++)
        for (unsigned x = 0; x < buffer.width; x++)
            line(y)[x] = (x & 255) | (y & 255) << 8 | ((x ^ y) & 255) << 16;
    crtc.connectors = (uintptr_t)connectors, crtc.count_connectors = 1;
    crtc.id = crtcs[0], crtc.fb = fb.id;
    call(SET_CRTC, &crtc, "SETCRTC");
    told(0, 0, buffer.width, buffer.height);
    printf("drawn %ux%u\n", buffer.width, buffer.height);

    unsigned x, y, width, height, colour, count;
    char command[80];
    while (fflush(stdout), fgets(command, sizeof command, stdin)) {
        if (sscanf(command, "rect %u %u %u %u %x", &x, &y, &width, &height, &colour) == 5)
            rect(x, y, width, height, colour);
        else if (sscanf(command, "many %u", &count) == 1)
            for (unsigned picture = 0; picture < count; picture++)
                rect(0, picture % buffer.height, buffer.width, 1, 0x010203 * (picture % 64));
        else
            break;
        printf("drawn\n");
    }
    return 0;
}
