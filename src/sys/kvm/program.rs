//! The bare-metal program of the reference guest, as machine code to be put into guest RAM.
//!
//! It is assembled with the library, into read-only data: the host never runs it. It uses relative jumps only, so it runs
//! wherever it is copied to. [`crate::sys::kvm::program::code`] gives the bytes; who loads it builds GDT, IDT and page
//! tables, fills the status pages, and starts each vCPU in long mode at the entry with `r15` and `rsp` at the beginning
//! and the end of its status page.
//!
//! What it does, on every vCPU: look at the clock and at the commands of the VMM; write as many pages as this tick allows,
//! checking the stamp of each before; halt until the next tick. A tick is an interrupt of the PIT, which the IOAPIC sends
//! to every vCPU. Where the kernel emulates guest code (2 us per instruction) the length of the inner loops is all
//! that counts: 12 instructions a page.
//!
//! A page's stamp is its sequence number in the last word and a checksum over sequence number and page address in the
//! first one: `sequence * K1 + address * K2`, modulo 2^64. It walks without a multiplication, and both ends of a page
//! being right means that the page was not torn in between. Which sequence number is due follows from the order
//! of the writes: each cycle visits its pages once a pass, so a page has the number of the last pass that reached it.

/// What a sequence number is multiplied by in a checksum.
pub const K1: u64 = 0x9e37_79b9_7f4a_7c15;
/// What a page's address is multiplied by in a checksum.
pub const K2: u64 = 0xd1b5_4a32_d192_ed03;
/// Where a page has its sequence number.
pub const SEQUENCE_OFFSET: u64 = 4088;

/// Ticks per second.
pub const TICKS_PER_SECOND: u64 = 250;
/// The PIT counts at 1,193,182 Hz (Intel 8254); 4773 of them are a tick of 4.0002 ms.
const PIT_DIVISOR: u64 = 1_193_182 / TICKS_PER_SECOND;
/// The interrupt vector of a tick, and that of a spurious interrupt.
pub const TICK_VECTOR: u64 = 0x20;
/// The vector that a LAPIC raises when there was nothing to raise.
pub const SPURIOUS_VECTOR: u64 = 0xff;

/// 32 bits in: CLOCK_REALTIME of the host in microseconds, wrapping.
pub const CLOCK_PORT: u16 = 0x600;
/// 32 bits in: the number of the newest request to verify (low half) and of the newest to forget the gap (high half).
pub const COMMAND_PORT: u16 = 0x604;
/// 32 bits out: the guest took an exception; the two top words of its stack, low halves.
pub const FAULT_PORT: u16 = 0x608;
/// The serial port's first register (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;

/// Where the status page of vCPU 0 is; the others follow, a page each.
pub const STATUS_BASE: u64 = 0x8000;

/// Pages that a vCPU writes or verifies at most between two looks at the clock: about 2 ms where code is emulated.
pub const CHUNK: u64 = 64;

/// The status page of a vCPU: what the guest keeps, and what the VMM reads. Offsets in bytes; 64 bits each.
pub mod status {
    /// How often the program was started: 1, or else it is corrupt.
    pub const STARTS: u64 = 0x00;
    /// Ticks taken.
    pub const HEARTBEATS: u64 = 0x08;
    /// Pages written.
    pub const WRITES: u64 = 0x10;
    /// Stamps found right.
    pub const VERIFIED: u64 = 0x18;
    /// Stamps found wrong.
    pub const CORRUPT: u64 = 0x20;
    /// The address (in the window) of the first wrong stamp.
    pub const FIRST_CORRUPT: u64 = 0x28;
    /// The longest time between two looks at the clock, in microseconds.
    pub const GAP: u64 = 0x30;
    /// The clock at the last look, 32 bits.
    pub const LAST: u64 = 0x38;
    /// The newest request to forget the gap that was met, 16 bits.
    pub const RESET_SEEN: u64 = 0x40;
    /// The newest request to verify that was begun, 16 bits.
    pub const VERIFY_SEEN: u64 = 0x48;
    /// The newest request to verify that was met.
    pub const VERIFY_DONE: u64 = 0x50;
    /// The heartbeats that the writes were paced by so far.
    pub const PACED: u64 = 0x58;
    /// Cycles that have not written each of their pages once.
    pub const WARMING: u64 = 0x60;
    /// The vCPU's number.
    pub const CPU: u64 = 0x68;
    /// The number of vCPUs.
    pub const VCPUS: u64 = 0x70;
    /// The heartbeat to print at next.
    pub const PRINT_AT: u64 = 0x78;
    /// The cycle that is being verified, or 0.
    pub const WALK: u64 = 0x80;
    /// 0 in its pages of the present pass, 1 in those of the one before.
    pub const WALK_PHASE: u64 = 0x88;
    /// The next page of the walk.
    pub const WALK_POSITION: u64 = 0x90;
    /// That page's checksum.
    pub const WALK_CHECKSUM: u64 = 0x98;
    /// That page's sequence number.
    pub const WALK_SEQUENCE: u64 = 0xa0;
    /// Pages left in this phase of the walk.
    pub const WALK_LEFT: u64 = 0xa8;
    /// The first cycle.
    pub const CYCLE_0: u64 = 0x100;
    /// The second cycle; it has 0 pages when the program has one.
    pub const CYCLE_1: u64 = 0x180;
}

/// A cycle: pages of the window that are visited in a fixed order, each once a pass. Offsets from the cycle's start.
pub mod cycle {
    /// The address of its first page.
    pub const BASE: u64 = 0x00;
    /// The first address after its last page.
    pub const END: u64 = 0x08;
    /// Its length in bytes.
    pub const SPAN: u64 = 0x10;
    /// `SPAN * K2`.
    pub const SPAN_CHECKSUM: u64 = 0x18;
    /// How far a page is from the one before it in the order, in bytes; has no factor in common with the pages.
    pub const STEP: u64 = 0x20;
    /// `STEP * K2`.
    pub const STEP_CHECKSUM: u64 = 0x28;
    /// The next page.
    pub const POSITION: u64 = 0x30;
    /// The checksum that it has to have (in the first pass: that it will have).
    pub const CHECKSUM: u64 = 0x38;
    /// The number of this pass, which the pages get; the first is 1 and finds pages of zeros.
    pub const SEQUENCE: u64 = 0x40;
    /// `BASE * K2`.
    pub const BASE_CHECKSUM: u64 = 0x48;
    /// Pages left in this pass.
    pub const LEFT: u64 = 0x50;
    /// Its pages.
    pub const PAGES: u64 = 0x58;
    /// What it may write per tick, in 1/65536 of a page.
    pub const QUOTA: u64 = 0x60;
    /// What is left of it, in the same unit.
    pub const BUDGET: u64 = 0x68;
    /// Pages to write at most at a time.
    pub const CHUNK: u64 = 0x70;
}

/// The program's bytes, and where in them the vCPUs and the interrupts enter.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// What is to be copied into guest RAM.
    pub bytes: &'static [u8],
    /// Where every vCPU starts.
    pub entry: u64,
    /// The handler of [`TICK_VECTOR`].
    pub tick: u64,
    /// The handler of [`SPURIOUS_VECTOR`].
    pub spurious: u64,
    /// The handler of every exception.
    pub fault: u64,
}

unsafe extern "C" {
    static PAGEFERRY_GUEST_START: [u64; 4];
    static PAGEFERRY_GUEST_END: u8;
}

/// The program.
#[must_use]
pub fn code() -> Program {
    let (start, end) = (&raw const PAGEFERRY_GUEST_START, &raw const PAGEFERRY_GUEST_END);
    let length = end as usize - start as usize;
    // SAFETY: both symbols are of the block below, in read-only data, the second behind the first; nothing writes there.
    let bytes = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), length) };
    // SAFETY: the block begins with these four words.
    let [entry, tick, spurious, fault] = unsafe { PAGEFERRY_GUEST_START };
    Program { bytes, entry, tick, spurious, fault }
}

// Registers that keep their meaning: r15 the status page of this vCPU, r14 the LAPIC. In the loops: rdi the page, rax its
// checksum, r9 and r10 the step of both, r11 the end of the cycle, rcx the pages to go, r12 and r13 sequence numbers.
std::arch::global_asm!(
    ".pushsection .rodata.pageferry_guest, \"a\", @progbits",
    ".balign 16",
    ".globl PAGEFERRY_GUEST_START",
    "PAGEFERRY_GUEST_START:",
    "    .quad 17f - PAGEFERRY_GUEST_START",
    "    .quad 14f - PAGEFERRY_GUEST_START",
    "    .quad 15f - PAGEFERRY_GUEST_START",
    "    .quad 16f - PAGEFERRY_GUEST_START",
    // A tick.
    "14: inc qword ptr [r15 + {HEARTBEATS}]",
    "    mov dword ptr [r14 + 0xb0], 0", // end of interrupt
    "    iretq",
    "15: iretq",
    // An exception: tell, and stop for good.
    "16: mov edx, {FAULT_PORT}",
    "    mov eax, [rsp]",
    "    out dx, eax",
    "    mov eax, [rsp + 8]",
    "    out dx, eax",
    "2:  cli",
    "    hlt",
    "    jmp 2b",
    // The entry.
    "17: mov r14d, 0xfee00000",
    "    inc qword ptr [r15 + {STARTS}]",
    "    cmp qword ptr [r15 + {STARTS}], 1",
    "    je 2f",
    "    inc qword ptr [r15 + {CORRUPT}]",
    "2:  mov dword ptr [r14 + 0xf0], 0x100 + {SPURIOUS_VECTOR}", // enable the LAPIC
    "    mov edx, {CLOCK_PORT}",
    "    in eax, dx",
    "    mov [r15 + {LAST}], eax",
    "    cmp qword ptr [r15 + {CPU}], 0",
    "    jne 20f",
    "    mov al, 0xff", // mask both PICs
    "    out 0x21, al",
    "    out 0xa1, al",
    "    mov al, 0x34", // channel 0, low then high byte, mode 2
    "    out 0x43, al",
    "    mov al, {PIT_LOW}",
    "    out 0x40, al",
    "    mov al, {PIT_HIGH}",
    "    out 0x40, al",
    "    mov ebx, 0xfec00000",
    "    mov dword ptr [rbx], 0x11", // KVM wires the PIT to pin 0 of the IOAPIC: to all LAPICs, fixed, edge
    "    mov dword ptr [rbx + 0x10], 0xff000000",
    "    mov dword ptr [rbx], 0x10",
    "    mov dword ptr [rbx + 0x10], {TICK_VECTOR}",
    "    lea rsi, [rip + 90f]",
    "    call 80f",
    // The main loop. Interrupts come only here, so a tick that falls into work is taken at its end, not lost.
    "20: sti",
    "    nop",
    "    cli",
    "21: call 30f",
    "    mov rax, [r15 + {HEARTBEATS}]",
    "    cmp rax, [r15 + {PACED}]",
    "    je 23f",
    "    mov [r15 + {PACED}], rax",
    // A new tick: the cycles' budgets anew. What was not written is forgotten, so a slow guest does not run after its rate.
    "    movzx ecx, word ptr [r15 + {CYCLE_0} + {BUDGET}]",
    "    add rcx, [r15 + {CYCLE_0} + {QUOTA}]",
    "    mov [r15 + {CYCLE_0} + {BUDGET}], rcx",
    "    movzx ecx, word ptr [r15 + {CYCLE_1} + {BUDGET}]",
    "    add rcx, [r15 + {CYCLE_1} + {QUOTA}]",
    "    mov [r15 + {CYCLE_1} + {BUDGET}], rcx",
    "    cmp qword ptr [r15 + {CPU}], 0",
    "    jne 23f",
    "    cmp rax, [r15 + {PRINT_AT}]",
    "    jb 23f",
    "    add rax, {TICKS_PER_SECOND}",
    "    mov [r15 + {PRINT_AT}], rax",
    "    call 70f",
    "23: xor ebx, ebx",
    "    lea rbp, [r15 + {CYCLE_0}]",
    "    call 40f",
    "    lea rbp, [r15 + {CYCLE_1}]",
    "    call 40f",
    "    call 60f",
    "    test ebx, ebx",
    "    jnz 20b",
    "    sti",
    "    hlt",
    "    cli",
    "    jmp 21b",
    // Look at the commands, then at the clock: a gap that is to be forgotten must not hide the one that ends just now.
    "30: mov edx, {COMMAND_PORT}",
    "    in eax, dx",
    "    mov ecx, eax",
    "    shr ecx, 16",
    "    cmp cx, word ptr [r15 + {RESET_SEEN}]",
    "    je 2f",
    "    mov word ptr [r15 + {RESET_SEEN}], cx",
    "    mov qword ptr [r15 + {GAP}], 0",
    "2:  cmp ax, word ptr [r15 + {VERIFY_SEEN}]",
    "    je 2f",
    "    mov word ptr [r15 + {VERIFY_SEEN}], ax",
    "    lea rbp, [r15 + {CYCLE_0}]",
    "    call 65f",
    "2:  mov edx, {CLOCK_PORT}",
    "    in eax, dx",
    "    mov ecx, eax",
    "    sub ecx, [r15 + {LAST}]",
    "    mov [r15 + {LAST}], eax",
    "    js 2f", // a clock that was set back
    "    cmp rcx, [r15 + {GAP}]",
    "    jbe 2f",
    "    mov [r15 + {GAP}], rcx",
    "2:  ret",
    // Write pages of the cycle rbp; ebx becomes 1 when there were any to write.
    "40: cmp qword ptr [r15 + {WALK}], 0", // the walk wants the pages to stand still
    "    jne 49f",
    "    cmp qword ptr [rbp + {SEQUENCE}], 1",
    "    je 50f",
    "    mov rcx, [rbp + {BUDGET}]",
    "    shr rcx, 16",
    "    jz 49f",
    "    cmp rcx, [rbp + {CYCLE_CHUNK}]",
    "    cmova rcx, [rbp + {CYCLE_CHUNK}]",
    "    cmp rcx, [rbp + {LEFT}]",
    "    cmova rcx, [rbp + {LEFT}]",
    "    mov rax, rcx",
    "    shl rax, 16",
    "    sub [rbp + {BUDGET}], rax",
    "    call 45f",
    "    add [r15 + {VERIFIED}], rcx",
    "    lea r13, [r12 - 1]",
    "    movabs r8, {K1}",
    "41: cmp [rdi], rax",
    "    jne 44f",
    "    cmp [rdi + {SEQUENCE_OFFSET}], r13",
    "    jne 44f",
    "42: add [rdi], r8",
    "    mov [rdi + {SEQUENCE_OFFSET}], r12",
    "    add rdi, r9",
    "    add rax, r10",
    "    cmp rdi, r11",
    "    jae 46f",
    "43: dec ecx",
    "    jnz 41b",
    "    mov [rbp + {POSITION}], rdi",
    "    mov [rbp + {CHECKSUM}], rax",
    "    cmp qword ptr [rbp + {LEFT}], 0",
    "    jne 49f",
    "    add [rbp + {CHECKSUM}], r8",
    "47: inc qword ptr [rbp + {SEQUENCE}]",
    "    mov rcx, [rbp + {PAGES}]",
    "    mov [rbp + {LEFT}], rcx",
    "49: ret",
    // A wrong stamp: count it, and put right what the next write builds on.
    "44: dec qword ptr [r15 + {VERIFIED}]",
    "    call 55f",
    "    mov [rdi], rax",
    "    jmp 42b",
    "46: sub rdi, [rbp + {SPAN}]",
    "    sub rax, [rbp + {SPAN_CHECKSUM}]",
    "    jmp 43b",
    // What both writing loops start with.
    "45: mov ebx, 1",
    "    add [r15 + {WRITES}], rcx",
    "    sub [rbp + {LEFT}], rcx",
    "    mov rdi, [rbp + {POSITION}]",
    "    mov rax, [rbp + {CHECKSUM}]",
    "    mov r12, [rbp + {SEQUENCE}]",
    "48: mov r9, [rbp + {STEP}]",
    "    mov r10, [rbp + {STEP_CHECKSUM}]",
    "    mov r11, [rbp + {END}]",
    "    ret",
    // The first pass: as fast as it goes, over pages that must be fresh.
    "50: mov ecx, {CHUNK}",
    "    cmp rcx, [rbp + {LEFT}]",
    "    cmova rcx, [rbp + {LEFT}]",
    "    call 45b",
    "51: cmp qword ptr [rdi], 0",
    "    jne 54f",
    "52: mov [rdi], rax",
    "    mov [rdi + {SEQUENCE_OFFSET}], r12",
    "    add rdi, r9",
    "    add rax, r10",
    "    cmp rdi, r11",
    "    jae 56f",
    "53: dec ecx",
    "    jnz 51b",
    "    mov [rbp + {POSITION}], rdi",
    "    mov [rbp + {CHECKSUM}], rax", // at the end of the pass: what the first page of the next has
    "    cmp qword ptr [rbp + {LEFT}], 0",
    "    jne 49b",
    "    dec qword ptr [r15 + {WARMING}]",
    "    jmp 47b",
    "54: call 55f",
    "    jmp 52b",
    "56: sub rdi, [rbp + {SPAN}]",
    "    sub rax, [rbp + {SPAN_CHECKSUM}]",
    "    jmp 53b",
    // Note the wrong page rdi.
    "55: inc qword ptr [r15 + {CORRUPT}]",
    "    cmp qword ptr [r15 + {FIRST_CORRUPT}], 0",
    "    jne 2f",
    "    mov [r15 + {FIRST_CORRUPT}], rdi",
    "2:  ret",
    // Go on with the walk over all pages ever written: those of this pass, then those of the one before.
    "60: mov rbp, [r15 + {WALK}]",
    "    test rbp, rbp",
    "    jz 49b",
    "    mov ebx, 1",
    "    mov rcx, [r15 + {WALK_LEFT}]",
    "    test rcx, rcx",
    "    jz 64f",
    "    mov edx, {CHUNK}",
    "    cmp rcx, rdx",
    "    cmova rcx, rdx",
    "    sub [r15 + {WALK_LEFT}], rcx",
    "    add [r15 + {VERIFIED}], rcx",
    "    mov rdi, [r15 + {WALK_POSITION}]",
    "    mov rax, [r15 + {WALK_CHECKSUM}]",
    "    mov r13, [r15 + {WALK_SEQUENCE}]",
    "    call 48b",
    "61: cmp [rdi], rax",
    "    jne 63f",
    "    cmp [rdi + {SEQUENCE_OFFSET}], r13",
    "    jne 63f",
    "62: add rdi, r9",
    "    add rax, r10",
    "    cmp rdi, r11",
    "    jae 66f",
    "67: dec ecx",
    "    jnz 61b",
    "    mov [r15 + {WALK_POSITION}], rdi",
    "    mov [r15 + {WALK_CHECKSUM}], rax",
    "    ret",
    "63: dec qword ptr [r15 + {VERIFIED}]",
    "    call 55b",
    "    jmp 62b",
    "66: sub rdi, [rbp + {SPAN}]",
    "    sub rax, [rbp + {SPAN_CHECKSUM}]",
    "    jmp 67b",
    "64: cmp qword ptr [r15 + {WALK_PHASE}], 0",
    "    jne 68f",
    "    mov qword ptr [r15 + {WALK_PHASE}], 1",
    "    dec qword ptr [r15 + {WALK_SEQUENCE}]",
    "    jz 68f", // nothing was written before the first pass
    "    movabs r8, {K1}",
    "    sub [r15 + {WALK_CHECKSUM}], r8",
    "    mov rax, [rbp + {LEFT}]",
    "    mov [r15 + {WALK_LEFT}], rax",
    "    ret",
    "68: lea rax, [r15 + {CYCLE_1}]",
    "    cmp rbp, rax",
    "    je 69f",
    "    mov rbp, rax",
    "    cmp qword ptr [rbp + {PAGES}], 0",
    "    jne 65f",
    "69: mov qword ptr [r15 + {WALK}], 0",
    "    mov rax, [r15 + {VERIFY_SEEN}]",
    "    mov [r15 + {VERIFY_DONE}], rax",
    "    ret",
    // Begin the walk over the cycle rbp.
    "65: mov r8, [rbp + {SEQUENCE}]",
    "    mov [r15 + {WALK_SEQUENCE}], r8",
    "    movabs rdx, {K1}",
    "    imul r8, rdx",
    "    add r8, [rbp + {BASE_CHECKSUM}]",
    "    mov [r15 + {WALK_CHECKSUM}], r8",
    "    mov r8, [rbp + {BASE}]",
    "    mov [r15 + {WALK_POSITION}], r8",
    "    mov r8, [rbp + {PAGES}]",
    "    sub r8, [rbp + {LEFT}]",
    "    mov [r15 + {WALK_LEFT}], r8",
    "    mov qword ptr [r15 + {WALK_PHASE}], 0",
    "    mov [r15 + {WALK}], rbp",
    "    ret",
    // Print the heartbeat, with the sums over all vCPUs.
    "70: lea rsi, [rip + 91f]",
    "    call 80f",
    "    mov rax, [r15 + {HEARTBEATS}]",
    "    call 85f",
    "    lea rsi, [rip + 92f]",
    "    call 80f",
    "    mov ecx, {STATUS_BASE} + {WRITES}",
    "    call 75f",
    "    lea rsi, [rip + 93f]",
    "    call 80f",
    "    mov ecx, {STATUS_BASE} + {CORRUPT}",
    "    call 75f",
    "    mov al, 10",
    "    jmp 83f",
    // The sum of a status word (ecx: vCPU 0's), printed.
    "75: mov edi, [r15 + {VCPUS}]",
    "    xor eax, eax",
    "2:  add rax, [rcx]",
    "    add ecx, 4096",
    "    dec edi",
    "    jnz 2b",
    "    jmp 85f",
    // Print the text rsi, which a zero byte ends.
    "80: mov al, [rsi]",
    "    test al, al",
    "    jz 49b",
    "    inc rsi",
    "    call 83f",
    "    jmp 80b",
    // Print the character al when the transmitter is empty.
    "83: mov ecx, eax",
    "    mov edx, {SERIAL_PORT} + 5",
    "2:  in al, dx",
    "    test al, 0x20",
    "    jz 2b",
    "    mov eax, ecx",
    "    mov edx, {SERIAL_PORT}",
    "    out dx, al",
    "    ret",
    // Print the number rax.
    "85: mov ecx, 10",
    "    push 0",
    "2:  xor edx, edx",
    "    div rcx",
    "    add edx, 48",
    "    push rdx",
    "    test rax, rax",
    "    jnz 2b",
    "3:  pop rax",
    "    test eax, eax",
    "    jz 49b",
    "    call 83b",
    "    jmp 3b",
    "90: .asciz \"pageferry guest: started\\n\"",
    "91: .asciz \"pageferry guest: heartbeat \"",
    "92: .asciz \", writes \"",
    "93: .asciz \", corrupt \"",
    ".globl PAGEFERRY_GUEST_END",
    "PAGEFERRY_GUEST_END:",
    ".popsection",
    K1 = const K1,
    SEQUENCE_OFFSET = const SEQUENCE_OFFSET,
    TICKS_PER_SECOND = const TICKS_PER_SECOND,
    PIT_LOW = const PIT_DIVISOR & 0xff,
    PIT_HIGH = const PIT_DIVISOR >> 8,
    TICK_VECTOR = const TICK_VECTOR,
    SPURIOUS_VECTOR = const SPURIOUS_VECTOR,
    CLOCK_PORT = const CLOCK_PORT,
    COMMAND_PORT = const COMMAND_PORT,
    FAULT_PORT = const FAULT_PORT,
    SERIAL_PORT = const SERIAL_PORT,
    STATUS_BASE = const STATUS_BASE,
    CHUNK = const CHUNK,
    STARTS = const status::STARTS,
    HEARTBEATS = const status::HEARTBEATS,
    WRITES = const status::WRITES,
    VERIFIED = const status::VERIFIED,
    CORRUPT = const status::CORRUPT,
    FIRST_CORRUPT = const status::FIRST_CORRUPT,
    GAP = const status::GAP,
    LAST = const status::LAST,
    RESET_SEEN = const status::RESET_SEEN,
    VERIFY_SEEN = const status::VERIFY_SEEN,
    VERIFY_DONE = const status::VERIFY_DONE,
    PACED = const status::PACED,
    WARMING = const status::WARMING,
    CPU = const status::CPU,
    VCPUS = const status::VCPUS,
    PRINT_AT = const status::PRINT_AT,
    WALK = const status::WALK,
    WALK_PHASE = const status::WALK_PHASE,
    WALK_POSITION = const status::WALK_POSITION,
    WALK_CHECKSUM = const status::WALK_CHECKSUM,
    WALK_SEQUENCE = const status::WALK_SEQUENCE,
    WALK_LEFT = const status::WALK_LEFT,
    CYCLE_0 = const status::CYCLE_0,
    CYCLE_1 = const status::CYCLE_1,
    BASE = const cycle::BASE,
    END = const cycle::END,
    SPAN = const cycle::SPAN,
    SPAN_CHECKSUM = const cycle::SPAN_CHECKSUM,
    STEP = const cycle::STEP,
    STEP_CHECKSUM = const cycle::STEP_CHECKSUM,
    POSITION = const cycle::POSITION,
    CHECKSUM = const cycle::CHECKSUM,
    SEQUENCE = const cycle::SEQUENCE,
    BASE_CHECKSUM = const cycle::BASE_CHECKSUM,
    LEFT = const cycle::LEFT,
    PAGES = const cycle::PAGES,
    QUOTA = const cycle::QUOTA,
    BUDGET = const cycle::BUDGET,
    CYCLE_CHUNK = const cycle::CHUNK,
);

#[cfg(test)]
mod tests {
    #[test]
    fn the_handlers_lie_in_the_code() {
        let program = super::code();
        assert!((200..4096 * 4).contains(&program.bytes.len()), "{}", program.bytes.len());
        for at in [program.entry, program.tick, program.spurious, program.fault] {
            assert!((32..program.bytes.len() as u64).contains(&at));
        }
    }
}
