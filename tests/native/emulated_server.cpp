// Runs functions of a library built for another processor, inside an emulator,
// for tests on this one.
//
// usage: emulated_server LIBRARY. Each request on stdin is a function's name,
// the memory that its pointers reach and its arguments; the answer on stdout is
// its result and that memory afterwards. Both ends are little-endian.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <string>
#include <vector>

namespace {

void read_exactly(void *to, size_t bytes) {
  if (bytes != 0 && fread(to, 1, bytes, stdin) != bytes)
    std::exit(0); // the other side has closed
}

template <typename T> T read() {
  T value;
  read_exactly(&value, sizeof value);
  return value;
}

void write(const void *from, size_t bytes) {
  if (fwrite(from, 1, bytes, stdout) != bytes)
    std::exit(1);
}

// Memory that begins as far past an aligned address as it did at home.
struct Region {
  std::vector<char> held;
  char *begin;
  size_t bytes;

  Region(size_t bytes, size_t misalignment) : held(bytes + 128), bytes(bytes) {
    begin = held.data() + (64 - reinterpret_cast<uintptr_t>(held.data()) % 64) +
            misalignment;
    read_exactly(begin, bytes);
  }
};

} // namespace

int main(int, char **arguments) {
  void *library = dlopen(arguments[1], RTLD_NOW);
  if (library == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  for (;;) {
    std::string name(read<int64_t>(), '\0');
    read_exactly(&name[0], name.size());
    std::vector<Region> regions;
    const int64_t count = read<int64_t>();
    regions.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t bytes = read<int64_t>(), misalignment = read<int64_t>();
      regions.emplace_back(bytes, misalignment);
    }
    // Integers and pointers take one register or eight bytes of the stack each,
    // and floating point has registers of its own: one shape of call serves
    // every function with at most one float argument.
    int64_t values[16] = {};
    for (int64_t i = 0, n = read<int64_t>(); i < n; ++i) {
      const int64_t region = read<int64_t>(), value = read<int64_t>();
      values[i] =
          region < 0 ? value
                     : reinterpret_cast<int64_t>(regions[region].begin + value);
    }
    const float real = read<float>();
    const bool text = read<int64_t>() != 0;
    void *function = dlsym(library, name.c_str());
    int64_t result = -1;
    if (function != nullptr) {
      const int64_t *v = values;
      result = reinterpret_cast<int64_t (*)(
          float, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
          int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
          int64_t, int64_t)>(function)(real, v[0], v[1], v[2], v[3], v[4], v[5],
                                       v[6], v[7], v[8], v[9], v[10], v[11],
                                       v[12], v[13], v[14], v[15]);
    }
    const char *answer =
        text && result != 0 ? reinterpret_cast<const char *>(result) : "";
    const int64_t length = int64_t(std::strlen(answer));
    write(&result, sizeof result);
    write(&length, sizeof length);
    write(answer, size_t(length));
    for (const Region &region : regions)
      write(region.begin, region.bytes);
    std::fflush(stdout);
  }
}
