// A fiber: a stack of its own and the stack pointer it was left with.
//
// The switch is written by hand because ucontext makes two system calls for the signal mask, which
// costs fifty times the switch itself. Only what a called function must preserve is saved. The
// floating-point control words are not: run() in scheduler.h sets them once for all fibers.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#define PYREID_ADDRESS_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define PYREID_ADDRESS_SANITIZER 1
#endif
#endif
#ifdef PYREID_ADDRESS_SANITIZER
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the running stack and its stack pointer in *save, then takes
// up the stack `load`. A linker group, as for an inline function: every file brings it, one stays;
// link-time optimisation assembles several files as one, hence the condition.
extern "C" void pyreid_switch_stack(void** save, void* load);

#if defined(__x86_64__)
asm(R"(
  .ifndef pyreid_switch_stack_is_here
  .set pyreid_switch_stack_is_here, 1
  .pushsection .text.pyreid_switch_stack,"axG",@progbits,pyreid_switch_stack,comdat
  .weak pyreid_switch_stack
  .hidden pyreid_switch_stack
  .type pyreid_switch_stack,@function
  .p2align 4
pyreid_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size pyreid_switch_stack,.-pyreid_switch_stack
  .popsection
  .endif
)");
#elif defined(__aarch64__)
asm(R"(
  .ifndef pyreid_switch_stack_is_here
  .set pyreid_switch_stack_is_here, 1
  .pushsection .text.pyreid_switch_stack,"axG",%progbits,pyreid_switch_stack,comdat
  .weak pyreid_switch_stack
  .hidden pyreid_switch_stack
  .type pyreid_switch_stack,%function
  .p2align 4
pyreid_switch_stack:
  sub sp, sp, #160
  stp x29, x30, [sp, #0]
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #0]
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
  .size pyreid_switch_stack,.-pyreid_switch_stack
  .popsection
  .endif
)");
#else
#error "the emulator knows the stacks of x86-64 and aarch64 only"
#endif

namespace pyreid::emulated {

class Fiber {
 public:
  // The context of whoever calls launch(): it has a stack already.
  Fiber() = default;

  // A fiber that runs `entry`, which must not return, when first switched to. `number` shifts its
  // frames within a page: with all stacks alike, their tops would fight over one set of the cache.
  Fiber(void (*entry)(), int number) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    mapped_ = kStackBytes + page;
    void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<unsigned char*>(memory);
    // The lowest page is a guard: a kernel with too large local arrays stops there.
    if (mprotect(memory_, page, PROT_NONE) != 0) {
      munmap(memory_, mapped_);
      throw std::bad_alloc();
    }
    bottom_ = memory_ + page;
    size_ = kStackBytes;
    unsigned char* top = memory_ + mapped_ - size_t(number % 32) * 128;
    void** frame = reinterpret_cast<void**>(top);  // the stack grows down from here
#if defined(__x86_64__)
    *--frame = nullptr;  // entry() finds this where its return address would be, 8 mod 16
    *--frame = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--frame = nullptr;
#else
    for (int i = 0; i < 20; ++i) *--frame = nullptr;
    frame[1] = reinterpret_cast<void*>(entry);  // x30, where the switch returns to
#endif
    stack_pointer_ = frame;
  }

  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (memory_ != nullptr) munmap(memory_, mapped_);
  }

  // Leaves the running fiber `from` and takes up `to`; returns when somebody switches back.
  static void switch_to(Fiber& from, Fiber& to) {
    left() = &from;
#ifdef PYREID_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
    pyreid_switch_stack(&from.stack_pointer_, to.stack_pointer_);
    arrived(from.fake_stack_);
  }

  // The first thing that entry() calls.
  static void started() { arrived(nullptr); }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;

  static Fiber*& left() {
    static Fiber* fiber = nullptr;
    return fiber;
  }

  // AddressSanitizer tells where the stack lies that was left: the only way to know the caller's.
  static void arrived(void* fake_stack) {
#ifdef PYREID_ADDRESS_SANITIZER
    __sanitizer_finish_switch_fiber(fake_stack, &left()->bottom_, &left()->size_);
#else
    (void)fake_stack;
#endif
  }

  void* stack_pointer_ = nullptr;
  unsigned char* memory_ = nullptr;
  size_t mapped_ = 0;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
};

}  // namespace pyreid::emulated
