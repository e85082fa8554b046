//! Guests that consist of one sector: real-mode programs that the firmware loads at 0x7c00. Shared with the tests of
//! other backends.
#![allow(clippy::unwrap_used, dead_code, missing_docs, unreachable_pub)]

/// `hlt`, forever.
const IDLE: &[u8] = &[0xf4, 0xeb, 0xfd];

fn disk(code: &[&[u8]]) -> Vec<u8> {
    let mut disk = code.concat();
    assert!(disk.len() <= 510);
    disk.resize(510, 0);
    disk.extend([0x55, 0xaa]);
    disk.resize(1 << 20, 0);
    disk
}

/// Writes a text to the serial console.
fn print(text: &str) -> Vec<u8> {
    let loop_end = 16 + 2;
    let mut code = vec![
        0xfa, 0x31, 0xc0, 0x8e, 0xd8, // cli; xor ax, ax; mov ds, ax
        0xbe, 0, 0x7c, // mov si, text
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb,
        0xf8, // next: lodsb; test al, al; jz end; out dx, al; jmp next
        0xeb, 0, // end: jmp over the text
    ];
    assert_eq!(code.len(), loop_end + 3);
    code[6] = u8::try_from(code.len()).unwrap();
    code[20] = u8::try_from(text.len() + 1).unwrap();
    code.extend(text.as_bytes());
    code.push(0);
    code
}

/// Powers off through PM1a_CNT of the chipset, at the address that the firmware assigned to it: SLP_EN with the type of
/// S5.
const POWER_OFF: &[u8] = &[0xba, 0x04, 0x06, 0xb8, 0x00, 0x20, 0xef];

/// INT 15h, function 86h: waits for a number of microseconds, here a million. Libvirt assumes that a guest failed to
/// start if it powers off before the start has completed.
const PAUSE: &[u8] = &[0xb4, 0x86, 0xb9, 0x0f, 0x00, 0xba, 0x40, 0x42, 0xcd, 0x15];

/// Does nothing, forever.
pub fn idle() -> Vec<u8> {
    disk(&[IDLE])
}

/// Writes a text, and powers off a moment later.
pub fn power_off(text: &str) -> Vec<u8> {
    disk(&[&print(text), PAUSE, POWER_OFF, IDLE])
}

/// Writes a text to the serial console repeatedly, as fast as possible.
pub fn write_endlessly(text: &str) -> Vec<u8> {
    // jmp 0:0x7c00
    disk(&[&print(text), &[0xea, 0x00, 0x7c, 0x00, 0x00]])
}

/// Powers off when the power button is pressed: sets PM1a_EN, then polls PM1a_STS, bit 8.
pub fn power_off_on_button() -> Vec<u8> {
    let wait = [
        0xba, 0x02, 0x06, 0xb8, 0x00, 0x01, 0xef, // mov dx, 0x602; mov ax, 0x100; out dx, ax
        0xba, 0x00, 0x06, 0xed, 0xf6, 0xc4, 0x01, 0x74,
        0xfa, // mov dx, 0x600; wait: in ax, dx; test ah, 1; jz wait
    ];
    disk(&[&print("ready"), &wait, POWER_OFF, IDLE])
}

/// Writes a text, overwrites the first sector of the first disk with that of another disk, and resets the machine.
pub fn install(text: &str, disk: &[u8]) -> Vec<u8> {
    let write = [
        0x31, 0xc0, 0x8e, 0xc0, 0xfb, // xor ax, ax; mov es, ax; sti
        0xb8, 0x01, 0x03, 0xbb, 0x00, 0x7e, // mov ax, 0x0301; mov bx, 0x7e00
        0xb9, 0x01, 0x00, 0xba, 0x80, 0x00, 0xcd, 0x13, // mov cx, 1; mov dx, 0x80; int 0x13
        0xb0, 0xfe, 0xe6, 0x64, // mov al, 0xfe; out 0x64, al
    ];
    let mut code = [print(text), write.to_vec(), IDLE.to_vec()].concat();
    code.resize(512, 0);
    [code, disk[..512].to_vec()].concat()
}

/// Returns a CD-ROM that boots this code (El Torito 1.0, no emulation): the descriptors from sector 16, the boot
/// catalogue at sector 19, the code at sector 20.
pub fn cdrom(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 16 * 2048];
    let mut sector = |content: &[&[u8]]| {
        let mut bytes = content.concat();
        bytes.resize(2048, 0);
        image.extend(bytes);
    };
    sector(&[b"\x01CD001\x01"]);
    let mut record = [b"\0CD001\x01EL TORITO SPECIFICATION".as_slice(), &[0; 41]].concat();
    assert_eq!(record.len(), 0x47);
    record.extend(19u32.to_le_bytes());
    sector(&[&record]);
    sector(&[b"\xffCD001\x01"]);
    let mut validation = [0u8; 32];
    validation[0] = 1;
    validation[30..].copy_from_slice(&[0x55, 0xaa]);
    let sum =
        validation.chunks(2).fold(0u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
    validation[28..30].copy_from_slice(&0u16.wrapping_sub(sum).to_le_bytes());
    sector(&[&validation, &[0x88, 0, 0, 0, 0, 0, 4, 0], &20u32.to_le_bytes()]);
    sector(&[code]);
    image
}

/// Reports a panic to the pvpanic device.
pub fn panic() -> Vec<u8> {
    disk(&[&print("Kernel panic"), &[0xba, 0x05, 0x05, 0xb0, 0x01, 0xee], IDLE])
}

/// Overwrites the whole disk with a part of the firmware, one cluster at a time, by INT 13h, function 43h.
pub fn fill_disk() -> Vec<u8> {
    disk(&[
        &[
            0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
            0xb4, 0x43, 0xb0, 0x00, 0xbe, 0x18, 0x7c, 0xcd,
            0x13, // next: mov ax, 0x4300; mov si, packet; int 0x13
            0x66, 0x81, 0x06, 0x20, 0x7c, 128, 0, 0, 0, // add dword [packet.sector], 128
            0xeb, 0xec, // jmp next
        ],
        // 64 sectors from f000:0000 to sector 128.
        &[0x10, 0, 64, 0, 0, 0, 0x00, 0xf0, 128, 0, 0, 0, 0, 0, 0, 0],
    ])
}
