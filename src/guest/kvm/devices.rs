//! The devices that the VMM emulates: a serial port, and the ports by which the program sees the clock and its orders.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::sys::kvm::program::{CLOCK_PORT, COMMAND_PORT, FAULT_PORT, SERIAL_PORT};

/// What is kept of the guest's output until somebody asks; older output goes first.
const CONSOLE_BYTES: usize = 64 << 10;

/// What moves with the guest. What the serial port printed does not.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct DeviceState {
    /// The serial port's registers as last written, DLL and DLM behind them.
    #[prost(bytes = "vec", tag = "1")]
    pub serial: Vec<u8>,
    /// The number of the newest request to verify every page; 16 bits.
    #[prost(uint32, tag = "2")]
    pub verify: u32,
    /// The number of the newest request to forget the gap; 16 bits.
    #[prost(uint32, tag = "3")]
    pub reset_gap: u32,
}

/// Registers of a 16550 that hold what is written to them: 8 by address, and 2 behind the divisor latch.
const SERIAL_REGISTERS: usize = 10;
const LINE_CONTROL: usize = 3;
const LINE_STATUS: u16 = 5;
/// In the line control register: addresses 0 and 1 are the divisor.
const DIVISOR_LATCH: u8 = 0x80;
/// In the line status register: the transmitter is empty, in both senses. It always is.
const TRANSMITTER_EMPTY: u8 = 0x60;

/// All emulated devices of a guest.
#[derive(Debug, Default)]
pub(super) struct Devices {
    serial: [u8; SERIAL_REGISTERS],
    console: VecDeque<u8>,
    verify: u16,
    reset_gap: u16,
    fault: Vec<u32>,
}

impl Devices {
    /// The guest reads a port.
    pub(super) fn read(&mut self, port: u16, into: &mut [u8]) {
        let value = match port {
            CLOCK_PORT => microseconds(),
            COMMAND_PORT => u32::from(self.verify) | u32::from(self.reset_gap) << 16,
            _ if (SERIAL_PORT..SERIAL_PORT + 8).contains(&port) => {
                u32::from(self.read_serial(port - SERIAL_PORT))
            }
            // Nobody there: the bus floats high.
            _ => u32::MAX,
        };
        for (byte, of_value) in into.iter_mut().zip(value.to_le_bytes().into_iter().cycle()) {
            *byte = of_value;
        }
    }

    /// The guest writes to a port.
    pub(super) fn write(&mut self, port: u16, bytes: &[u8]) {
        match (port, bytes) {
            (FAULT_PORT, &[a, b, c, d]) if self.fault.len() < 2 => {
                self.fault.push(u32::from_le_bytes([a, b, c, d]));
            }
            _ if (SERIAL_PORT..SERIAL_PORT + 8).contains(&port) => {
                for byte in bytes {
                    self.write_serial(port - SERIAL_PORT, *byte);
                }
            }
            _ => {}
        }
    }

    fn read_serial(&self, register: u16) -> u8 {
        match register {
            LINE_STATUS => TRANSMITTER_EMPTY,
            _ => self.serial[self.serial_index(register)],
        }
    }

    fn write_serial(&mut self, register: u16, byte: u8) {
        let index = self.serial_index(register);
        if index != 0 {
            self.serial[index] = byte;
            return;
        }
        if self.console.len() == CONSOLE_BYTES {
            self.console.pop_front();
        }
        self.console.push_back(byte);
    }

    fn serial_index(&self, register: u16) -> usize {
        let latched = register < 2 && self.serial[LINE_CONTROL] & DIVISOR_LATCH != 0;
        usize::from(register) + if latched { 8 } else { 0 }
    }

    /// What was printed since the last call.
    pub(super) fn console(&mut self) -> String {
        let bytes: Vec<u8> = self.console.drain(..).collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Asks the program to verify every page; answers the number that it will confirm.
    pub(super) fn request_verify(&mut self) -> u16 {
        self.verify = self.verify.wrapping_add(1);
        self.verify
    }

    /// Asks the program to forget the longest gap; answers the number that it will confirm.
    pub(super) fn request_reset(&mut self) -> u16 {
        self.reset_gap = self.reset_gap.wrapping_add(1);
        self.reset_gap
    }

    /// What the program told when it took an exception: the top of its stack.
    pub(super) fn fault(&self) -> Option<(u32, u32)> {
        match self.fault[..] {
            [first, second] => Some((first, second)),
            _ => None,
        }
    }

    pub(super) fn save(&self) -> DeviceState {
        DeviceState {
            serial: self.serial.to_vec(),
            verify: self.verify.into(),
            reset_gap: self.reset_gap.into(),
        }
    }

    /// Takes on what was saved, or names what does not fit.
    pub(super) fn load(&mut self, state: &DeviceState) -> Result<(), String> {
        let serial = state.serial.as_slice().try_into();
        self.serial =
            serial.map_err(|_| format!("{} serial registers, not {SERIAL_REGISTERS}", state.serial.len()))?;
        self.verify = u16::try_from(state.verify).map_err(|_| "a number above 16 bits".to_owned())?;
        self.reset_gap = u16::try_from(state.reset_gap).map_err(|_| "a number above 16 bits".to_owned())?;
        Ok(())
    }
}

/// The host's wall clock, wrapping after 71 minutes: the same on both hosts as far as their clocks agree.
fn microseconds() -> u32 {
    // A clock before 1970 shows as 0; the guest then sees no gaps, and nothing else depends on it.
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_serial_port_prints_and_keeps_its_registers() {
        let mut devices = Devices::default();
        devices.write(SERIAL_PORT + 3, &[0x83]);
        devices.write(SERIAL_PORT, &[1]);
        devices.write(SERIAL_PORT + 3, &[3]);
        devices.write(SERIAL_PORT, b"hello");
        let mut byte = [0];
        devices.read(SERIAL_PORT + 5, &mut byte);
        assert_eq!(byte, [0x60]);
        let mut moved = Devices::default();
        moved.load(&devices.save()).unwrap();
        moved.read(SERIAL_PORT + 3, &mut byte);
        assert_eq!(byte, [3]);
        assert_eq!((devices.console(), devices.console()), ("hello".into(), String::new()));
    }

    #[test]
    fn the_console_is_bounded() {
        let mut devices = Devices::default();
        for n in 0..CONSOLE_BYTES + 10 {
            devices.write(SERIAL_PORT, &[b'a' + (n % 26) as u8]);
        }
        assert_eq!(devices.console().len(), CONSOLE_BYTES);
    }

    #[test]
    fn requests_are_numbered_and_an_absent_port_floats() {
        let mut devices = Devices::default();
        let mut word = [0; 4];
        assert_eq!((devices.request_verify(), devices.request_reset(), devices.request_verify()), (1, 1, 2));
        devices.read(COMMAND_PORT, &mut word);
        assert_eq!(word, [2, 0, 1, 0]);
        devices.read(0x1234, &mut word);
        assert_eq!(word, [255; 4]);
        let state = DeviceState { verify: 1 << 16, ..devices.save() };
        assert!(Devices::default().load(&state).is_err());
    }
}
