/* A picture as float32 planes of red, green and blue: real data for the two programs. */
#ifndef PICTURE_H_
#define PICTURE_H_

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  int64_t height, width;
  float* values; /* (3, height, width), 0 to 255; to be freed */
} picture;

/* Reads a binary PPM file (P6, no comments, 8 bits a colour); 0 where it is none. */
static inline int read_picture(const char* path, picture* into) {
  FILE* file = fopen(path, "rb");
  if (!file) return 0;
  int width = 0, height = 0, most = 0;
  int found = fscanf(file, "P6 %d %d %d", &width, &height, &most);
  int space = fgetc(file); /* one byte of white space ends the header */
  int sound = found == 3 && space != EOF && most == 255 && width > 0 && height > 0 &&
              width <= 1 << 15 && height <= 1 << 15;
  size_t plane = sound ? (size_t)width * (size_t)height : 0;
  unsigned char* pixels = sound ? (unsigned char*)malloc(3 * plane) : NULL;
  into->values = pixels ? (float*)malloc(3 * plane * sizeof(float)) : NULL;
  sound = into->values && fread(pixels, 3, plane, file) == plane;
  for (size_t i = 0; sound && i < 3 * plane; ++i) into->values[i % 3 * plane + i / 3] = pixels[i];
  if (!sound) free(into->values);
  free(pixels);
  fclose(file);
  into->height = height;
  into->width = width;
  return sound;
}

#endif
